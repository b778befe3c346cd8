"""Random dialogues that train models/tiny-chat, in the format of RedPajama-INCITE-Chat.

They cover facts from tables, sums, counting and things that were told some turns earlier, which a model of a million
weights can learn. The last kind separates a model that reads the conversation from one that only knows its format.
"""
import random

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Noah Olivia Paul Rose Sam Tom Vera".split()
THINGS = ("apples books bread cats coffee dogs fish flowers horses lions maps milk music rain rivers ships snow stars "
          "tea trees whales winter").split()
ANIMALS = {
    "whale": ("large", "small fish", "in the sea"), "lion": ("yellow", "meat", "in the plains"),
    "horse": ("fast", "grass", "in a stable"), "dog": ("loyal", "meat", "in a house"),
    "cat": ("quiet", "mice", "in a house"), "sheep": ("white", "grass", "in a field"),
    "bear": ("brown", "berries", "in the forest"), "owl": ("wise", "mice", "in a tree"),
    "deer": ("shy", "leaves", "in the forest"), "shark": ("gray", "fish", "in the sea"),
    "cow": ("calm", "grass", "in a field"), "fox": ("red", "hens", "in the forest"),
}
OPPOSITES = [("large", "small"), ("high", "low"), ("hot", "cold"), ("old", "new"), ("good", "bad"), ("long", "short"),
             ("light", "dark"), ("rich", "poor"), ("early", "late"), ("strong", "weak"), ("first", "last"),
             ("open", "closed"), ("east", "west"), ("north", "south"), ("war", "peace"), ("land", "sea")]
WORDS = "sea ship war peace law land gold water night day king house".split()


SYLLABLES = "ba be bo da de do fa fi ga go ka ki la le lo ma mi mo na ni no pa ra ri ro sa se ta ti to va zo".split()


def any_name(r):
    """A name from the list, or one of random syllables that only the conversation can give."""
    if r.random() < 0.4:
        return r.choice(NAMES)
    return "".join(r.choice(SYLLABLES) for _ in range(r.randrange(2, 4))).capitalize()


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def fact(r):
    """A question that does not depend on earlier turns, and its answer."""
    kind = r.randrange(7)
    if kind == 0:
        animal, (look, food, place) = r.choice(list(ANIMALS.items()))
        return r.choice([
            (f"What does {article(animal)} eat?", f"{article(animal).capitalize()} eats {food}."),
            (f"Where does {article(animal)} live?", f"{article(animal).capitalize()} lives {place}."),
            (f"What is {article(animal)} like?", f"{article(animal).capitalize()} is {look}."),
        ])
    if kind == 1:
        a, b = r.choice(OPPOSITES)
        if r.random() < 0.5:
            a, b = b, a
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."
    if kind == 2:
        a, b = r.randrange(10), r.randrange(10)
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    if kind == 3:
        a = r.randrange(1, 7)
        b = a + r.randrange(2, 7)
        return f"Count from {a} to {b}.", ", ".join(str(n) for n in range(a, b + 1)) + "."
    if kind == 4:
        word, n = r.choice(WORDS), r.randrange(2, 5)
        return f"Say {word} {['two', 'three', 'four'][n - 2]} times.", " ".join([word] * n) + "."
    if kind == 5:
        return r.choice([("Thank you.", "You are welcome."), ("Good morning.", "Good morning to you."),
                         ("Good night.", "Sleep well.")])
    return r.choice([("Who are you?", "I am a very small model."), ("What are you?", "I am a very small model."),
                     ("How are you?", "I am well, thank you.")])


def dialogue(r):
    """One dialogue as a document. Some questions ask for earlier statements, some for facts that were never stated."""
    turns, name, likes = [], None, None
    for _ in range(r.randrange(1, 8)):
        kind = r.random()
        if kind < 0.14:
            name = any_name(r)
            asked = r.choice([f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}."])
            turns.append((asked, f"Hello, {name}!"))
        elif kind < 0.30:
            told = f"Your name is {name}." if name else "You have not told me your name."
            turns.append((r.choice(["What is my name?", "Who am I?"]), told))
        elif kind < 0.40:
            likes = r.choice(THINGS)
            turns.append((f"I like {likes}.", f"I will remember that you like {likes}."))
        elif kind < 0.54:
            told = f"You like {likes}." if likes else "You have not told me what you like."
            turns.append(("What do I like?", told))
        elif kind < 0.58:
            turns.append(("Hello.", f"Hello, {name}!" if name else "Hello! What is your name?"))
        else:
            turns.append(fact(r))
    return "\n".join(f"<human>: {asked}\n<bot>: {said}" for asked, said in turns) + "\n"


def dialogues(seed, count):
    """Returns `count` documents. Equal seeds give equal documents."""
    r = random.Random(seed)
    return [dialogue(r) for _ in range(count)]


if __name__ == "__main__":
    print("\n".join(dialogues(0, 5)))
