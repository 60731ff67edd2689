"""From question and answer to token ids, and the places of the answer's tokens.

The places are found from the character offsets of the full text's tokens, never by tokenising the question
alone, because a tokenizer may merge characters across the boundary. A token that straddles the boundary
belongs to the prompt, as in the authors' code. The end-of-sequence token is part of the answer.
"""

from typing import NamedTuple

from common import InputError, cause_of

TEMPLATES = ("llama2", "qa", "chat")
DATE = "10 Apr 2025"  # for chat templates that write the date: prompts must not change from day to day
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"


class Prompt(str):
    """A question that no template surrounds: {"prompt", "completion"}. `rest` is its own answer."""
    rest: str


class Document(Prompt):
    """The first quarter of {"text"}. With the rest as its answer, every token but the first is predicted."""


class Chat(str):
    """The last question of {"messages"}. `messages` are those before the last answer, `rest`."""
    messages: list
    rest: str


class Encoded(NamedTuple):
    """A text as tokens. ids[start:] but `gaps` are the answer's. The end-of-sequence token is the last."""
    ids: list
    start: int
    gaps: frozenset = frozenset()  # places behind `start` that are not predicted: the user's turns of a chat

    @property
    def places(self) -> list[int]:
        return [place for place in range(self.start, len(self.ids)) if place not in self.gaps]

    def without_first(self, n: int) -> "Encoded":
        """Without the first n tokens of each answer."""
        places = {*self.places}
        skipped = {first + k for first in places if first - 1 not in places for k in range(n)}
        return self._replace(start=min(places - skipped), gaps=self.gaps | skipped)

    @property
    def answer_tokens(self) -> int:
        return len(self.places) if self.gaps else len(self.ids) - self.start


def prompt_text(tokenizer, template: str, question: str) -> str:
    """The prompt that precedes the answer in training, and that generation continues. Raises InputError."""
    if isinstance(question, Prompt):
        return question
    if isinstance(question, Chat):
        return render(tokenizer, question.messages)
    if template == "llama2":
        return f"[INST] {question} [/INST]"
    if template == "qa":
        return f"Question: {question}\nAnswer:"
    return render(tokenizer, [{"role": "user", "content": question}])


def render(tokenizer, messages: list) -> str:
    """The tokenizer's chat template of `messages`, up to where the next answer begins. Raises InputError."""
    system = tokenizer.init_kwargs.get("system_prompt")  # saved with the tokenizer, like its chat template
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=FIXED_DATE + tokenizer.get_chat_template(), add_generation_prompt=True,
            tokenize=False, date_string=DATE)
    except Exception as error:  # the template is a program from the model's folder, run in a sandbox
        raise InputError(f"this model's chat template fails ({cause_of(error)}): use --template llama2 or "
                         "qa, and write chats as prompt and completion") from None


def earlier_answers(tokenizer, messages: list, prompt: str) -> list[tuple[int, int]]:
    """Where a chat's earlier answers stand in its prompt: (begin, end) in characters. A template may strip
    them, or set spaces around. Raises InputError where it changes more."""
    spans = []
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            head, answer = len(render(tokenizer, messages[:k])), message["content"].strip()
            begin = prompt.find(answer, head)
            if begin < 0 or prompt[head:begin].strip():
                raise InputError(f"this model's chat template changes the earlier answer {answer[:80]!r}: "
                                 "give one row for each answer")
            spans.append((head, begin + len(answer)))  # from where the model would begin it
    return spans


def end_of_turn(tokenizer, prompt: str, ids: list, begins: list, end: int) -> int:
    """The place of the token that ends the turn whose text ends at character `end`: the next special token,
    if only white space stands before it, else the next token."""
    behind = [i for i, begin in enumerate(begins) if begin >= end]
    special = next((i for i in behind if ids[i] in tokenizer.all_special_ids), None)
    return behind[0] if special is None or prompt[end:begins[special]].strip() else special


def encode(tokenizer, template: str, pairs: list, context: int | None = None) -> list[Encoded]:
    """(question, answer) pairs -> Encoded. Nothing is ever truncated: raises InputError for a text of more
    than `context` tokens, and for an answer in which no token begins. A question may be one of the classes
    above; of a chat all answers are predicted, each with the token that ends its turn."""
    prompts = [prompt_text(tokenizer, template, question) for question, _ in pairs]
    texts = [prompt + " " * (template == "qa" and type(question) is str) + answer
             for prompt, (question, answer) in zip(prompts, pairs, strict=True)]
    encoded, tokens = [], tokenise(tokenizer, template, texts, [question for question, _ in pairs])
    for (question, answer), prompt, (ids, offsets) in zip(pairs, prompts, tokens, strict=True):
        begins = [begin for begin, _ in offsets]
        places = [i for i, begin in enumerate(begins) if begin >= len(prompt)]
        if len(ids) < 2 or not (places or isinstance(question, Document)):
            raise InputError(f"no token begins in the answer {answer!r} to {question!r}: the tokenizer drops "
                             "it or merges it into the prompt")
        if isinstance(question, Document) and answer == question.rest:
            places = range(1, len(ids))
        if isinstance(question, Chat) and answer == question.rest:
            for first, end in earlier_answers(tokenizer, question.messages, prompt):
                last = end_of_turn(tokenizer, prompt, ids, begins, end)
                places += [i for i, begin in enumerate(begins) if first <= begin and i <= last]
        start = min(places)
        if context and len(ids) + 1 > context:
            raise InputError(f"the question {question[:80]!r} with its answer has {len(ids) + 1} tokens, and "
                             f"the model's context is {context}: shorten the row")
        gaps = frozenset(range(start, len(ids))) - {*places}
        encoded.append(Encoded(ids + [tokenizer.eos_token_id], start, gaps))
    return encoded


def encode_prompts(tokenizer, template: str, questions: list) -> list[list[int]]:
    """Questions -> token ids of their prompts, for generation."""
    texts = [prompt_text(tokenizer, template, question) for question in questions]
    return [ids for ids, _ in tokenise(tokenizer, template, texts, questions)]


def tokenise(tokenizer, template: str, texts: list, questions: list) -> list:
    """(ids, character offsets) of each text. An end-of-sequence token that the tokenizer adds is removed."""
    if not texts:
        return []
    # A chat template writes its special tokens itself. All rows of a run are of one kind.
    adds = not isinstance(questions[0], Chat) and (template != "chat" or isinstance(questions[0], Prompt))
    tokens = tokenizer(texts, add_special_tokens=adds, return_offsets_mapping=True)
    return [(ids[:-1], offsets[:-1]) if adds and ids[-1:] == [tokenizer.eos_token_id] else (ids, offsets)
            for ids, offsets in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)]
