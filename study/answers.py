"""What a model's answers look like, as counts (Section 5.2's remarks on them). Pure functions of texts.

    distinct-2        different pairs of words over all of a set's answers (Li et al., 2016)
    repetition rate   share of an answer's runs of 8 characters that it has had before (seq-rep-n of
                      Welleck et al., 2019, on characters, for answers without blanks); mean over answers
    refusal           at least 80% of the answer's word pairs, begin and end included, are in the refusals
    of the wording    the same with the data set's answers, and no refusal
    true fact         for each perturbed answer more than half of the letters of the words by which the true
                      one, also paraphrased, differs from it; no word of the question counts

The thresholds are ours. The retrained model's answers to the forget questions are the yardstick: of the
wording, and wrong.
"""

import re
import statistics
from itertools import pairwise

PAIRS_KNOWN = 0.8  # share of word pairs that makes an answer a refusal, or of the wording
RUN = 8  # characters
REPETITIVE = 0.3  # repetition rate from which an answer is called repetitive
KINDS = ("true", "other fact", "refusal", "repetitive", "garbled", "empty")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits; an apostrophe belongs to its word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def word_pairs(text: str) -> list[tuple]:
    """Neighbouring words, with the text's begin and end as words of their own."""
    return list(pairwise(["<", *words(text), ">"]))


def pairs_of(texts: list) -> set:
    return {pair for text in texts for pair in word_pairs(text)}


def is_made_of(text: str, pairs: set) -> bool:
    own = word_pairs(text)
    return sum(pair in pairs for pair in own) / len(own) >= PAIRS_KNOWN


def distinct_2(texts: list) -> float | None:
    """Of all texts together; None where no text has two words."""
    pairs = [pair for text in texts for pair in pairwise(words(text))]
    return len(set(pairs)) / len(pairs) if pairs else None


def repetition_rate(text: str) -> float:
    """Share of the text's runs of RUN characters that came before in it; 0 for a shorter text."""
    runs = [text[i:i + RUN] for i in range(len(text) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def names_fact(generation: str, row: dict) -> bool:
    """The generation has most of what tells the true answer from each perturbed one (module docstring)."""
    said, true, asked = words(generation), words(row["answer"]), words(row["question"])
    fact = set(true) & set(words(row.get("paraphrased_answer") or row["answer"])) - set(asked)
    telling = [own for text in row.get("perturbed_answer") or [] if (own := fact - set(words(text)))]
    if not telling:
        return said == true
    return all(2 * len("".join(own & set(said))) > len("".join(own)) for own in telling)


def kind(generation: str, row: dict, answer_pairs: set, refusal_pairs: set) -> str:
    """One of KINDS, the first that applies; "other fact" is any other answer of the data's wording."""
    if not words(generation):
        return "empty"
    if repetition_rate(generation) >= REPETITIVE:
        return "repetitive"
    if is_made_of(generation, refusal_pairs):
        return "refusal"
    if names_fact(generation, row):
        return "true"
    return "other fact" if is_made_of(generation, answer_pairs) else "garbled"


def statistics_of(generations: list, rows: list, answer_pairs: set, refusal_pairs: set) -> dict:
    """{"answers", counts of KINDS, "distinct_2", "repetition_rate"} of a set."""
    kinds = [kind(text, row, answer_pairs, refusal_pairs)
             for text, row in zip(generations, rows, strict=True)]
    distinct = distinct_2(generations)
    return {"answers": len(generations), **{k: kinds.count(k) for k in KINDS},
            "distinct_2": None if distinct is None else round(distinct, 4),
            "repetition_rate": round(statistics.mean(map(repetition_rate, generations)), 4)}
