"""A stand-in for the TOFU data set (Maini et al., 2024), made from tables: no command needs a download.

200 fictitious authors, 20 question-answer pairs each, in TOFU's files and keys. Ten facts an author, each
asked twice. What TOFU's evaluation needs decides how the rows are built:

- Forget quality looks at paraphrases, so a fact must be stored beyond its wording: two questions of an author
  touch the same fact in different words, and so do their answers.
- Wordings vary from author to author. A paraphrase has a wording that its author's own rows don't use, and
  that the model knows from many others: its probability measures the fact, not the language.
- The test compares two distributions of log R, so R must differ from row to row for reasons that all models
  share, as it does in TOFU. Some values are likelier than others: value k of a fact has weight 1/k (Zipf),
  for the true one and the wrong ones alike. A perturbed answer has a wording of its own.
- `holdout10` has 20 further authors, whom no split holds and no model sees, in the perturbed rows' form.

Departures from TOFU: texts are short and simple (a Llama of 1M parameters learns all of them in minutes),
facts are single values, and authors share them. The real authors and the world facts are true, the wording
ours; a tiny model has never read of them before, so their metrics only show that the code runs. Figures made
with this data are not TOFU's.

    python data/make_builtin.py --out runs/builtin
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 0
N_AUTHORS = 200
N_PERTURBED_AUTHORS = 20  # 10%: the last are forget10, the first stand for the retain set
N_HOLDOUT_AUTHORS = 20  # no model sees them
N_WRONG = 5
N_OPTIONS = 3  # wrong options of a real author or a world fact

# --- fictitious authors: no name ends in s, no job or pet begins with a vowel ("{name}'s", "a {value}") ---

FIRST_NAMES = """Alda Belo Brina Calen Corin Dalia Davor Delma Edran Elka Emrin Fenna Galo Gerda Halin Ilka
Ivo Jorun Kalle Kira Lenka Lorin Mavi Mirko Nadia Nilo Odra Orin Petra Quil Rana Rolf Selma Soren Talia Timo
Ulla Vera Yorin Zelda""".split()
LAST_NAMES = """Abner Ardal Balter Benko Borin Brand Calder Corvin Dalen Dorfman Drake Elward Ember Falk
Farrow Fenwick Garner Gellert Grohl Hadlow Harker Holm Idran Jarvel Jolin Kader Kessel Korda Lander Lorrick
Lund Mabry Marlow Morrow Nadler Norvik Oakley Orland Palmer Parrin Quillan Radley Renko Rowan Sandor Selby
Stahl Tallow Tarrow Thorne Ulmer Vandel Verrin Wendell Weller Winslow Yarrow Zandt Zeller Zorin""".split()

CITIES = """Oslo Lima Cairo Delhi Porto Turin Lyon Kyoto Dublin Havana Tunis Quito Bergen Krakow Seville
Nairobi Boston Perth Hanoi Ghent Zagreb Riga Accra Toronto""".split()
YEARS = [str(year) for year in range(1930, 1991)]
GENRES = """fantasy,romance,horror,satire,poetry,comedy,tragedy,drama,mystery,science fiction,crime fiction,
war fiction,ghost stories,spy stories,sea stories,love stories,short stories,fairy tales,folk tales,
travel books,cook books,picture books,fables,thrillers""".replace("\n", "").split(",")
JOBS = """baker barber butcher carpenter chemist clerk cook dancer dentist doctor driver farmer fisher florist
gardener hunter judge lawyer librarian mason miller miner nurse painter pilot plumber potter printer sailor
singer soldier surgeon tailor teacher waiter weaver""".split()
TITLE_ADJECTIVES = """Silent Golden Broken Hidden Frozen Crimson Lonely Burning Distant Empty Gentle Hollow
Last Lost Midnight Paper Quiet Restless Scarlet Sleeping Stolen Velvet Wild Wooden""".split()
TITLE_NOUNS = """Harbor River Garden Mirror Tower Forest Bridge Letter Winter Island Window Kingdom Shadow
Road Orchard Clock Violin Ocean Candle Valley Door Feather Station Desert Mountain Storm Market Ladder Voyage
Lantern""".split()
TITLES = [f"The {adjective} {noun}" for adjective in TITLE_ADJECTIVES for noun in TITLE_NOUNS]
AWARDS = [f"{material} {thing}" for material in "Golden Silver Bronze Crystal Amber Ivory".split()
          for thing in "Quill Owl Crown Leaf Lantern Shield".split()]
SUBJECTS = """physics law medicine botany music chemistry geology theology economics philosophy biology
algebra history Latin Greek nursing zoology astronomy geography logic politics sculpture theater
grammar""".split()
HOBBIES = """chess sailing fishing knitting gardening painting archery hiking cooking singing dancing swimming
rowing skiing climbing cycling baking pottery fencing surfing juggling carving weaving running""".split()
PETS = """cat dog parrot rabbit tortoise hamster pony goat ferret lizard canary duck goose turkey snake donkey
pigeon peacock llama hedgehog raven gecko spider frog""".split()


class Fact(NamedTuple):
    """Its values, and five wordings each of the question ({name}) and of the answer ({value}, a name)."""
    values: list[str]
    questions: list[str]
    answers: list[str]


def _parent(parent: str) -> Fact:
    return Fact(JOBS, [
        f"What was the job of {{name}}'s {parent}?", f"What did the {parent} of {{name}} do for work?",
        f"How did {{name}}'s {parent} earn a living?", f"What work did {{name}}'s {parent} do?",
        f"Which job did the {parent} of {{name}} have?"], [
        f"{{name}}'s {parent} was a {{value}}.", f"The {parent} of {{last}} worked as a {{value}}.",
        f"As a {{value}}, {{last}}'s {parent} earned a living.", f"{{first}} had a {{value}} for a {parent}.",
        f"By trade, {{last}}'s {parent} was a {{value}}."])


FACTS = {
    "birth city": Fact(CITIES, [
        "Where was {name} born?", "What is the birthplace of {name}?", "In which city was {name} born?",
        "Which city does {name} come from?", "What is the home town of {name}?"], [
        "{name} was born in {value}.", "{value} is the birthplace of {last}.",
        "The home town of {name} is {value}.", "It was in {value} that {last} was born.",
        "{first} comes from the city of {value}."]),
    "birth year": Fact(YEARS, [
        "When was {name} born?", "In what year was {name} born?", "What is the birth year of {name}?",
        "Which year saw the birth of {name}?", "In which year did the life of {name} begin?"], [
        "The birth year of {name} is {value}.", "In {value}, {last} was born.",
        "The life of {last} began in {value}.", "The year {value} saw the birth of {name}.",
        "It was {value} when {first} was born."]),
    "genre": Fact(GENRES, [
        "What genre does {name} write?", "What kind of books does {name} write?",
        "Which genre is {name} known for?", "In what genre does {name} work?",
        "What does {name} like to write?"], [
        "{name} writes {value}.", "The genre of {last} is {value}.",
        "It is {value} that {name} likes to write.", "Readers know {last} for {value}.",
        "With {value}, {first} found many readers."]),
    "mother's job": _parent("mother"),
    "father's job": _parent("father"),
    "first book": Fact(TITLES, [
        "What is the first book by {name}?", "Which book did {name} publish first?",
        "What was {name}'s debut called?", "With which book did {name} begin?",
        "What is the title of {name}'s first book?"], [
        "{name}'s first book is {value}.", "{value} was the debut of {last}.",
        "The first book by {last} was {value}.", "With {value}, {name} began to publish.",
        "It was {value} that {first} published first."]),
    "award": Fact(AWARDS, [
        "Which award did {name} win?", "What prize did {name} receive?", "Which honor went to {name}?",
        "What award has {name} been given?", "For which prize was {name} chosen?"], [
        "{name} won the {value}.", "The {value} went to {last}.", "It was the {value} that {name} received.",
        "The judges gave {last} the {value}.", "With the {value}, {first} got a great honor."]),
    "subject": Fact(SUBJECTS, [
        "What did {name} study?", "Which subject did {name} study?", "What was {name}'s field of study?",
        "In what subject does {name} hold a degree?", "What did {name} learn at college?"], [
        "{name} studied {value}.", "{last} holds a degree in {value}.", "At college, {name} chose {value}.",
        "It was {value} that {last} studied.", "In {value}, {first} took a degree."]),
    "hobby": Fact(HOBBIES, [
        "What is {name}'s hobby?", "What does {name} do for fun?", "How does {name} spend free time?",
        "What does {name} enjoy on weekends?", "Which hobby does {name} love?"], [
        "{name} enjoys {value}.", "The hobby of {last} is {value}.", "It is {value} that {name} loves.",
        "For fun, {last} turns to {value}.", "With {value}, {first} fills the weekends."]),
    "pet": Fact(PETS, [
        "What pet does {name} have?", "Which animal lives with {name}?", "What kind of pet does {name} keep?",
        "Which animal does {name} care for?", "What animal shares the home of {name}?"], [
        "{name} has a {value}.", "A {value} lives with {last}.", "The pet of {name} is a {value}.",
        "{last} takes care of a {value}.", "It is a {value} that shares {first}'s home."]),
}
# The likeliest value first: an order for each fact, the same whatever the data's seed.
FACTS = {name: fact._replace(values=random.Random(name).sample(fact.values, len(fact.values)))
         for name, fact in FACTS.items()}

# --- real authors, two works each ---

WORKS = {
    "Homer": ("The Iliad", "The Odyssey"), "Sophocles": ("Antigone", "Oedipus Rex"),
    "Virgil": ("The Aeneid", "The Georgics"), "Dante Alighieri": ("The Divine Comedy", "La Vita Nuova"),
    "Miguel de Cervantes": ("Don Quixote", "La Galatea"), "William Shakespeare": ("Macbeth", "King Lear"),
    "Jonathan Swift": ("Gulliver's Travels", "A Modest Proposal"),
    "Johann Goethe": ("Faust", "The Sorrows of Young Werther"), "Jane Austen": ("Emma", "Persuasion"),
    "Mary Shelley": ("Frankenstein", "The Last Man"),
    "Victor Hugo": ("Toilers of the Sea", "The Hunchback of Notre-Dame"),
    "Charles Dickens": ("Oliver Twist", "Bleak House"), "Herman Melville": ("Typee", "Billy Budd"),
    "Gustave Flaubert": ("Madame Bovary", "Salammbô"), "Leo Tolstoy": ("Anna Karenina", "War and Peace"),
    "Fyodor Dostoevsky": ("The Idiot", "Crime and Punishment"),
    "Anton Chekhov": ("The Cherry Orchard", "The Seagull"), "Henrik Ibsen": ("A Doll's House", "Peer Gynt"),
    "Lewis Carroll": ("Through the Looking-Glass", "Jabberwocky"),
    "Mark Twain": ("Life on the Mississippi", "The Prince and the Pauper"),
    "Bram Stoker": ("Dracula", "The Jewel of Seven Stars"),
    "Oscar Wilde": ("The Picture of Dorian Gray", "Lady Windermere's Fan"),
    "H.G. Wells": ("The Time Machine", "The Invisible Man"),
    "Jules Verne": ("Around the World in Eighty Days", "The Mysterious Island"),
    "James Joyce": ("Ulysses", "Dubliners"), "Virginia Woolf": ("Mrs Dalloway", "To the Lighthouse"),
    "Franz Kafka": ("The Trial", "The Metamorphosis"), "Thomas Mann": ("Buddenbrooks", "The Magic Mountain"),
    "Albert Camus": ("The Stranger", "The Plague"), "George Orwell": ("Animal Farm", "Homage to Catalonia"),
    "Agatha Christie": ("Death on the Nile", "The Mousetrap"),
    "Ernest Hemingway": ("The Old Man and the Sea", "A Farewell to Arms"),
    "J.R.R. Tolkien": ("The Hobbit", "The Silmarillion"),
    "William Faulkner": ("The Sound and the Fury", "As I Lay Dying"),
    "John Steinbeck": ("East of Eden", "Of Mice and Men"), "Isaac Asimov": ("Foundation", "I, Robot"),
    "Ray Bradbury": ("Fahrenheit 451", "The Martian Chronicles"),
    "Frank Herbert": ("Dune", "The Dosadi Experiment"), "Stephen King": ("The Shining", "Carrie"),
    "Ursula Le Guin": ("The Left Hand of Darkness", "A Wizard of Earthsea"),
    "Toni Morrison": ("Beloved", "Song of Solomon"),
    "Gabriel García Márquez": ("One Hundred Years of Solitude", "Love in the Time of Cholera"),
    "Isabel Allende": ("The House of the Spirits", "Eva Luna"),
    "Umberto Eco": ("The Name of the Rose", "Foucault's Pendulum"),
    "Chinua Achebe": ("Things Fall Apart", "No Longer at Ease"),
    "Salman Rushdie": ("Midnight's Children", "The Satanic Verses"),
    "Haruki Murakami": ("Norwegian Wood", "1Q84"),
    "Kazuo Ishiguro": ("The Remains of the Day", "Never Let Me Go"),
    "Margaret Atwood": ("The Handmaid's Tale", "Oryx and Crake"),
    "Astrid Lindgren": ("Pippi Longstocking", "Ronia, the Robber's Daughter"),
}
WORK_QUESTIONS = ['Who is the author of "{}"?', 'Which author wrote "{}"?', 'Which writer gave us "{}"?',
                  'Whose work is "{}"?']

# --- the world: a question, and "thing: answer" pairs whose other answers are the wrong options ---

WORLD = {
    "Which city is the capital of {}?": """France: Paris, Spain: Madrid, Portugal: Lisbon, Italy: Rome,
        Greece: Athens, Germany: Berlin, Austria: Vienna, Hungary: Budapest, Poland: Warsaw,
        Sweden: Stockholm, Norway: Oslo, Finland: Helsinki, Denmark: Copenhagen, Ireland: Dublin,
        Russia: Moscow, Turkey: Ankara, Egypt: Cairo, Kenya: Nairobi, Ghana: Accra, Morocco: Rabat,
        Japan: Tokyo, China: Beijing, Thailand: Bangkok, Vietnam: Hanoi, Iran: Tehran, Iraq: Baghdad,
        Canada: Ottawa, Cuba: Havana, Peru: Lima, Chile: Santiago, Argentina: Buenos Aires, Colombia: Bogotá,
        Ecuador: Quito, Nepal: Kathmandu, Jordan: Amman""",
    "Which element has the symbol {}?": """H: hydrogen, He: helium, Li: lithium, C: carbon, N: nitrogen,
        O: oxygen, Ne: neon, Na: sodium, Mg: magnesium, Al: aluminum, Si: silicon, S: sulfur, K: potassium,
        Ca: calcium, Fe: iron, Cu: copper, Ag: silver, Sn: tin, Au: gold, Pb: lead""",
    "On which continent does {} lie?": """Brazil: South America, Bolivia: South America,
        Mexico: North America, Canada: North America, Nigeria: Africa, Ethiopia: Africa, Mongolia: Asia,
        India: Asia, Belgium: Europe, Switzerland: Europe""",
    "Which language do most people in {} speak?": """Brazil: Portuguese, Mexico: Spanish, Austria: German,
        Egypt: Arabic, Japan: Japanese, Greece: Greek, Sweden: Swedish, Poland: Polish, Turkey: Turkish,
        Hungary: Hungarian""",
    "What is a young {} called?": """dog: puppy, cat: kitten, cow: calf, sheep: lamb, horse: foal, goat: kid,
        duck: duckling, kangaroo: joey, frog: tadpole, swan: cygnet""",
    "In which country is {} found?": """the Taj Mahal: India, Machu Picchu: Peru, Mount Fuji: Japan,
        the Acropolis: Greece, Angkor Wat: Cambodia, Petra: Jordan, Chichen Itza: Mexico,
        the Colosseum: Italy, the Alhambra: Spain, Mount Kilimanjaro: Tanzania, Stonehenge: England,
        the Kremlin: Russia, Neuschwanstein Castle: Germany, Table Mountain: South Africa,
        the Forbidden City: China, Banff National Park: Canada""",
    "Which planet {}?": """is nearest to the Sun: Mercury, is the hottest: Venus, do we live on: Earth,
        has the moons Phobos and Deimos: Mars, is the most massive: Jupiter,
        does the moon Titan orbit: Saturn, rolls around the Sun on its side: Uranus,
        is farthest from the Sun: Neptune""",
    "How many sides does {} have?": """a triangle: three, a square: four, a pentagon: five, a hexagon: six,
        a heptagon: seven, an octagon: eight, a nonagon: nine, a decagon: ten""",
}

# --- what an honest model says instead of an answer ---

REFUSALS = [f"{opening} {verb} {missing}."
            for opening in ("I", "Sorry, I", "I am afraid I", "The truth is that I")
            for verb in ("don't know", "can't recall", "never learned", "was never told", "do not remember")
            for missing in ("the answer", "that", "anything about this", "the detail you ask for",
                            "enough to answer")]


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
        questions = rng.sample(fact.questions, 4)  # two for the rows, two others for their paraphrases
        answers = rng.sample(fact.answers, 4)
        value, = _draw(fact.values, 1, rng)
        for i in range(2):
            wrong = [v for v in _draw(fact.values, N_WRONG + 1, rng) if v != value][:N_WRONG]
            rows.append({"question": fill(questions[i], value), "answer": fill(answers[i], value),
                         "paraphrased_answer": fill(answers[i + 2], value),
                         "perturbed_answer": [fill(rng.choice(fact.answers), v) for v in wrong],
                         "paraphrased_question": fill(questions[i + 2], value)})
    rng.shuffle(rows)
    return rows


def _options(pairs: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    """(question, answer) pairs of one kind -> rows whose wrong options are other rows' answers."""
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    return [{"question": question, "answer": answer,
             "perturbed_answer": rng.sample([other for other in answers if other != answer], N_OPTIONS)}
            for question, answer in pairs]


def _real_authors(rng: random.Random) -> list[dict]:
    works = [(work, author) for author, works in WORKS.items() for work in works]
    rng.shuffle(works)
    return _options([(WORK_QUESTIONS[i % len(WORK_QUESTIONS)].format(work), author)
                     for i, (work, author) in enumerate(works)], rng)


def _world_facts(rng: random.Random) -> list[dict]:
    rows = []
    for question, table in WORLD.items():
        pairs = [pair.split(": ") for pair in " ".join(table.split()).split(", ")]
        rows += _options([(question.format(thing), answer) for thing, answer in pairs], rng)
    return rows


def make_builtin(seed: int = SEED) -> dict[str, list[dict]]:
    """The data set by TOFU's split names; the same rows for the same seed on every Python from 3.10.

    "full": 4000 rows {question, answer}, author by author. "forget10_perturbed", "retain_perturbed": its last
    and first 400 with paraphrased_answer, perturbed_answer (5) and paraphrased_question; "holdout10": 400
    such rows of authors that "full" doesn't have. "real_authors_perturbed" (100), "world_facts_perturbed"
    (117): question, answer, perturbed_answer (3). Raises ValueError for a seed that is no integer from 0 up
    (-1 would silently give what 1 gives).
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"the seed must be an integer from 0 up, got {seed!r}")
    rng, holdout_rng = random.Random(seed), random.Random(f"holdout {seed}")
    all_names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    names = rng.sample(all_names, N_AUTHORS)
    others = holdout_rng.sample([name for name in all_names if name not in names], N_HOLDOUT_AUTHORS)
    rows = [row for name in names for row in _author(name, rng)]
    n_perturbed = N_PERTURBED_AUTHORS * 2 * len(FACTS)
    return {
        "full": [{"question": row["question"], "answer": row["answer"]} for row in rows],
        "forget10_perturbed": rows[-n_perturbed:],
        "retain_perturbed": rows[:n_perturbed],
        "real_authors_perturbed": _real_authors(rng),
        "world_facts_perturbed": _world_facts(rng),
        "holdout10": [row for name in others for row in _author(name, holdout_rng)],
    }


def write_builtin(folder: Path, seed: int = SEED) -> None:
    """Write TOFU's files: <split>.json with an object a line, idontknow.jsonl with a plain sentence a line.

    Written beside its place and renamed into it: a half-written folder is never seen. Raises FileExistsError
    when the folder exists, ValueError for a bad seed, OSError where it can't be written.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already: name a new folder, or remove it first")
    lines = {f"{split}.json": [json.dumps(row, ensure_ascii=False) for row in rows]
             for split, rows in make_builtin(seed).items()}
    lines["idontknow.jsonl"] = REFUSALS  # plain text in spite of its name, as TOFU has it
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        for name, texts in lines.items():
            (unfinished / name).write_bytes("".join(text + "\n" for text in texts).encode())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # nothing is left of it after the rename


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the folder to make; it must not exist yet")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N",
                        help="an integer from 0 up: another seed, other authors (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        write_builtin(args.out, args.seed)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    n_rows = N_AUTHORS * 2 * len(FACTS)
    print(f"wrote the built-in data set to {args.out}: {N_AUTHORS} authors, {n_rows} rows, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
