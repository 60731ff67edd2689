"""From question and answer to token ids, with the supervised answer tokens marked.

The answer is found from character offsets of the FULL text's tokens, never by tokenising the question alone:
a tokenizer may merge across the boundary. A token that straddles it belongs to the prompt (as in the authors'
code). The end-of-sequence token is supervised.
"""

from typing import NamedTuple

from support.errors import InputError, cause_of

TEMPLATES = ("llama2", "qa", "chat")
TODAY = "10 Apr 2025"  # for chat templates that write the date: a run must see the same prompts tomorrow
SAME_DAY = "{%- macro strftime_now(format) -%}" + TODAY + "{%- endmacro -%}"


class Encoded(NamedTuple):
    """ids: the whole sequence; ids[start:] are the answer's tokens, the end-of-sequence token last."""
    ids: list
    start: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.start


def system_prompt_of(tokenizer) -> str | None:
    """It travels with the tokenizer, in its saved settings, as the chat template does."""
    return tokenizer.init_kwargs.get("system_prompt")


def prompt_text(tokenizer, template: str, question: str) -> str:
    """The prompt exactly as trained on; generation continues it."""
    if template == "llama2":
        return f"[INST] {question} [/INST]"
    if template == "qa":
        return f"Question: {question}\nAnswer:"
    if template != "chat":
        raise InputError(f"unknown template {template!r}: need one of {', '.join(TEMPLATES)}")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("--template chat: this tokenizer brings no chat template; use llama2 or qa")
    system = system_prompt_of(tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    try:  # the template is a program from the model's folder; transformers runs it in a sandbox
        return tokenizer.apply_chat_template(messages, chat_template=SAME_DAY + tokenizer.get_chat_template(),
                                             add_generation_prompt=True, tokenize=False, date_string=TODAY)
    except Exception as error:  # whatever the sandbox or the template objects to: the sentence carries it
        raise InputError(f"--template chat: this model's chat template fails ({cause_of(error)}); "
                         "use --template llama2 or qa") from None


def encode(tokenizer, template: str, pairs: list, context: int | None = None) -> list[Encoded]:
    """(question, answer) pairs -> Encoded, one batched call of the tokenizer. Raises InputError where a text
    is longer than `context` tokens (nothing is ever truncated), or where no token begins in the answer."""
    prompts = [prompt_text(tokenizer, template, question) for question, _ in pairs]
    gap = " " if template == "qa" else ""
    texts = [prompt + gap + answer for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
    encoded, tokens = [], _tokens(tokenizer, template, texts)
    for (question, answer), prompt, (ids, offsets) in zip(pairs, prompts, tokens, strict=True):
        start = next((i for i, (begin, _) in enumerate(offsets) if begin >= len(prompt)), None)
        if start is None:
            raise InputError(f"no token begins in the answer {answer!r} to {question!r}: the tokenizer drops "
                             "it or merges it into the prompt")
        if context and len(ids) + 1 > context:
            raise InputError(f"the question {question[:80]!r} with its answer takes {len(ids) + 1} tokens, "
                             f"the model's context is {context}: shorten the row, or take another model")
        encoded.append(Encoded(ids + [tokenizer.eos_token_id], start))
    return encoded


def encode_prompts(tokenizer, template: str, questions: list) -> list[list[int]]:
    """Prompt token ids for generation."""
    texts = [prompt_text(tokenizer, template, question) for question in questions]
    return [ids for ids, _ in _tokens(tokenizer, template, texts)]


def _tokens(tokenizer, template: str, texts: list) -> list:
    """(ids, character offsets) of each text, without the end-of-sequence token that some tokenizers add."""
    # A chat template writes its special tokens out, so the tokenizer must add none.
    adds = template != "chat"
    made = tokenizer(texts, add_special_tokens=adds, return_offsets_mapping=True)
    return [(ids[:-1], offsets[:-1]) if adds and ids[-1:] == [tokenizer.eos_token_id] else (ids, offsets)
            for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True)]
