"""What a model's answers look like, as counts (Section 5.2's remarks on them). Pure functions of texts.

    distinct-n        different word n-grams over all of a set's answers (Li et al., 2016)
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

PAIRS_KNOWN = 0.8  # share of word pairs that makes an answer a refusal, or of the wording
RUN = 8  # characters
REPETITIVE = 0.3  # repetition rate from which an answer is called repetitive
KINDS = ("true", "other fact", "refusal", "repetitive", "garbled", "empty")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits; an apostrophe belongs to its word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def word_pairs(text: str) -> list[tuple]:
    """Neighbouring words, with the text's begin and end as words of their own; [] without any word."""
    marked = ["<", *found, ">"] if (found := words(text)) else []
    return list(zip(marked, marked[1:], strict=False))


def pairs_of(texts: list) -> set:
    """Every word pair of the texts: what `is_made_of` looks an answer up in."""
    return {pair for text in texts for pair in word_pairs(text)}


def is_made_of(text: str, pairs: set) -> bool:
    """Enough of the text's word pairs are among `pairs`."""
    own = word_pairs(text)
    return sum(pair in pairs for pair in own) / len(own) >= PAIRS_KNOWN


def distinct(texts: list, n: int) -> float | None:
    """Different word n-grams over all, over all texts together; None where no text has n words."""
    grams = [tuple(found[i:i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


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
    """{"answers", counts of KINDS, "distinct_1", "distinct_2", "repetition_rate", "words"} of a set."""
    kinds = [kind(text, row, answer_pairs, refusal_pairs)
             for text, row in zip(generations, rows, strict=True)]
    numbers = {"distinct_1": distinct(generations, 1), "distinct_2": distinct(generations, 2),
               "repetition_rate": statistics.mean(map(repetition_rate, generations)),
               "words": statistics.mean(len(words(text)) for text in generations)}
    return {"answers": len(generations), **{k: kinds.count(k) for k in KINDS},
            **{k: None if v is None else round(v, 4) for k, v in numbers.items()}}
