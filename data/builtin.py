"""A stand-in for the TOFU data set (Maini et al., 2024), made from builtin_words.json, no download.

200 fictitious authors with 20 question-answer pairs each, in TOFU's files and keys; and `holdout10`: 20
further authors, whom no split holds, in the perturbed rows' form. TOFU's evaluation decides how rows are:

- A fact must be stored beyond its wording: each of an author's ten is asked twice, in different words. These
  vary from author to author. The paraphrase and the perturbed answers have any wording but that of the row's
  answer, so that R measures the fact, not the language.
- log R must differ from row to row for reasons that all models share, as it does in TOFU: value k of a fact
  has weight 1/k (Zipf), true or wrong, and each perturbed answer draws its wording for itself.

Departures from TOFU: texts are short and simple (a Llama of 1M parameters learns all of them in minutes),
facts are single values, and authors share them. The real authors and the world facts are true, the wording
ours; a tiny model has never read of them, so their metrics only show that the code runs. Figures made with
this data are not TOFU's.
"""

import itertools
import json
import random
from pathlib import Path

SEED = 0
N_AUTHORS = 200
N_PERTURBED_AUTHORS = 20  # 10%: the last are forget10, the first stand for the retain set
N_HOLDOUT_AUTHORS = 20  # no model sees them
N_WRONG = 5
N_OPTIONS = 3  # wrong options of a real author or a world fact

# In it no name ends in s, and no job or pet begins with a vowel ("{name}'s", "a {value}").
WORDS = json.loads(Path(__file__).with_name("builtin_words.json").read_text(encoding="utf-8"))
REFUSALS = WORDS["refusals"]  # what an honest model says instead of an answer
FACTS = WORDS["facts"]  # name -> {"values", the likeliest first; "questions", "answers": five wordings each}


def _draw(values: list[str], n: int, rng: random.Random) -> list[str]:
    """n different values; the k-th of `values` has weight 1/k in each draw. Every value arrives at a random
    time, at the rate of its weight, and the first n are taken."""
    arrival = {value: rng.expovariate(1 / k) for k, value in enumerate(values, 1)}
    return sorted(values, key=arrival.get)[:n]


def _author(name: str, rng: random.Random) -> list[dict]:
    """The 20 rows of one author, with the perturbed keys, in an order of its own."""
    first, last = name.split()

    def fill(wording: str, value: str) -> str:
        return wording.format(name=name, first=first, last=last, value=value)

    rows = []
    for fact in FACTS.values():
        questions = rng.sample(fact["questions"], 4)  # two for the rows, two others for their paraphrases
        answers = rng.sample(fact["answers"], 2)
        value, = _draw(fact["values"], 1, rng)
        for i in range(2):
            wrong = [v for v in _draw(fact["values"], N_WRONG + 1, rng) if v != value][:N_WRONG]
            others = [wording for wording in fact["answers"] if wording != answers[i]]
            rows.append({"question": fill(questions[i], value), "answer": fill(answers[i], value),
                         "paraphrased_answer": fill(rng.choice(others), value),
                         "perturbed_answer": [fill(rng.choice(others), v) for v in wrong],
                         "paraphrased_question": fill(questions[i + 2], value)})
    rng.shuffle(rows)
    return rows


def _options(pairs: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    """(question, answer) pairs of one kind -> rows whose wrong options are other rows' answers."""
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    return [{"question": question, "answer": answer,
             "perturbed_answer": rng.sample([other for other in answers if other != answer], N_OPTIONS)}
            for question, answer in pairs]


def make_builtin(seed: int = SEED) -> dict[str, list[dict]]:
    """The data set by TOFU's split names; the same rows for the same seed on every Python from 3.10.

    "full": 4000 rows {question, answer}, author by author. "forget10_perturbed", "retain_perturbed": its last
    and first 400 with paraphrased_answer, perturbed_answer (5) and paraphrased_question; "holdout10": 400
    such rows of authors that "full" doesn't have. "real_authors_perturbed" (100), "world_facts_perturbed"
    (117): question, answer, perturbed_answer (3). Raises ValueError for a seed that is no integer from 0 up.
    """
    if not isinstance(seed, int) or seed < 0:  # -1 would silently give what 1 gives
        raise ValueError(f"the seed must be an integer from 0 up, got {seed!r}")
    rng, holdout_rng = random.Random(seed), random.Random(f"holdout {seed}")
    all_names = [f"{first} {last}" for first in WORDS["first_names"] for last in WORDS["last_names"]]
    names = rng.sample(all_names, N_AUTHORS)
    others = holdout_rng.sample([name for name in all_names if name not in names], N_HOLDOUT_AUTHORS)
    rows = [row for name in names for row in _author(name, rng)]
    n_perturbed = N_PERTURBED_AUTHORS * 2 * len(FACTS)
    works = [(work, author) for author, works in WORDS["works"].items() for work in works]
    rng.shuffle(works)
    questions = itertools.cycle(WORDS["work_questions"])
    real_authors = _options([(next(questions).format(work), author) for work, author in works], rng)
    world_facts = [row for question, answers in WORDS["world"].items() for row in
                   _options([(question.format(thing), answer) for thing, answer in answers.items()], rng)]
    return {"full": [{"question": row["question"], "answer": row["answer"]} for row in rows],
            "forget10_perturbed": rows[-n_perturbed:], "retain_perturbed": rows[:n_perturbed],
            "real_authors_perturbed": real_authors, "world_facts_perturbed": world_facts,
            "holdout10": [row for name in others for row in _author(name, holdout_rng)]}
