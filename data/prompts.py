"""From question and answer to token ids, and the place where the answer's tokens begin.

The place is found from the character offsets of the full text's tokens, never by tokenising the question
alone, because a tokenizer may merge characters across the boundary. A token that straddles the boundary
belongs to the prompt, as in the authors' code. The end-of-sequence token is part of the answer.
"""

from typing import NamedTuple

from common import InputError, cause_of

TEMPLATES = ("llama2", "qa", "chat")
DATE = "10 Apr 2025"  # for chat templates that write the date: prompts must not change from day to day
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"


class Encoded(NamedTuple):
    """A text as tokens. ids[start:] are the answer's tokens; the last one is the end-of-sequence token."""
    ids: list
    start: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.start


def prompt_text(tokenizer, template: str, question: str) -> str:
    """The prompt that precedes the answer in training, and that generation continues. Raises InputError."""
    if template == "llama2":
        return f"[INST] {question} [/INST]"
    if template == "qa":
        return f"Question: {question}\nAnswer:"
    system = tokenizer.init_kwargs.get("system_prompt")  # saved with the tokenizer, like its chat template
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=FIXED_DATE + tokenizer.get_chat_template(), add_generation_prompt=True,
            tokenize=False, date_string=DATE)
    except Exception as error:  # the template is a program from the model's folder, run in a sandbox
        raise InputError(f"--template chat: this model's chat template fails ({cause_of(error)}); use llama2 "
                         "or qa") from None


def encode(tokenizer, template: str, pairs: list, context: int | None = None) -> list[Encoded]:
    """(question, answer) pairs -> Encoded. Nothing is ever truncated: raises InputError for a text of more
    than `context` tokens, and for an answer in which no token begins."""
    prompts = [prompt_text(tokenizer, template, question) for question, _ in pairs]
    gap = " " if template == "qa" else ""
    texts = [prompt + gap + answer for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
    encoded, tokens = [], tokenise(tokenizer, template, texts)
    for (question, answer), prompt, (ids, offsets) in zip(pairs, prompts, tokens, strict=True):
        start = next((i for i, (begin, _) in enumerate(offsets) if begin >= len(prompt)), None)
        if start is None:
            raise InputError(f"no token begins in the answer {answer!r} to {question!r}: the tokenizer drops "
                             "it or merges it into the prompt")
        if context and len(ids) + 1 > context:
            raise InputError(f"the question {question[:80]!r} with its answer has {len(ids) + 1} tokens, and "
                             f"the model's context is {context}: shorten the row")
        encoded.append(Encoded(ids + [tokenizer.eos_token_id], start))
    return encoded


def encode_prompts(tokenizer, template: str, questions: list) -> list[list[int]]:
    """Questions -> token ids of their prompts, for generation."""
    texts = [prompt_text(tokenizer, template, question) for question in questions]
    return [ids for ids, _ in tokenise(tokenizer, template, texts)]


def tokenise(tokenizer, template: str, texts: list) -> list:
    """(ids, character offsets) of each text. An end-of-sequence token that the tokenizer adds is removed."""
    adds = template != "chat"  # a chat template writes its special tokens itself
    tokens = tokenizer(texts, add_special_tokens=adds, return_offsets_mapping=True)
    return [(ids[:-1], offsets[:-1]) if adds and ids[-1:] == [tokenizer.eos_token_id] else (ids, offsets)
            for ids, offsets in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)]
