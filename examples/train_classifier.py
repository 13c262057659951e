"""A job for Tidemill that trains something real: which of four languages a line is written in, by a small network.

    tidemill job submit --tenant demo --devices 1 --preemptible --grace 10s -- python examples/train_classifier.py

It needs nothing but Python. The network (letters in pairs -> 24 hidden units -> softmax) is trained by plain gradient
descent on sentences that are made from word lists by a fixed seed, so that every run sees the same ones in the same
order. How it lives on borrowed devices:

- Every few batches, and when it is asked to go (SIGTERM), it writes a checkpoint: weights, how far it has come, and
  the state of its random numbers. First beside, then by a rename, so that a kill leaves the old one or the new one.
- At the start it goes on from the checkpoint in TIDEMILL_CHECKPOINT_DIR, if there is one. Nothing is done twice and
  nothing is left out: the weights at the end are the same, to the last bit, as those of a run that nobody disturbed.
- Having checkpointed, it ends; the platform starts it again when there is room.

Runs alone as well: without Tidemill's variables, it writes into the current directory.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import signal
import time
from pathlib import Path

WORDS = {
    "en": "the tide mill grinds all night and the water runs back to the sea when the gate is open".split(),
    "de": "die mühle mahlt die ganze nacht und das wasser läuft zurück ins meer wenn das tor offen ist".split(),
    "fr": "le moulin tourne toute la nuit et l'eau retourne vers la mer quand la porte est ouverte".split(),
    "nl": "de molen maalt de hele nacht en het water loopt terug naar zee als de poort open staat".split(),
}
LANGUAGES = sorted(WORDS)
FEATURES, HIDDEN, BATCH = 256, 24, 16


class Model:
    """Two layers. Weights are lists of rows."""

    def __init__(self, dice: random.Random) -> None:
        self.first = [[dice.gauss(0, 0.1) for _ in range(HIDDEN)] for _ in range(FEATURES)]
        self.second = [[dice.gauss(0, 0.1) for _ in LANGUAGES] for _ in range(HIDDEN)]

    def forward(self, features: dict[int, float]) -> tuple[list[float], list[float]]:
        """The hidden units, and the probability of each language."""
        hidden = [
            math.tanh(sum(value * self.first[at][unit] for at, value in features.items())) for unit in range(HIDDEN)
        ]
        scores = [sum(hidden[unit] * self.second[unit][k] for unit in range(HIDDEN)) for k in range(len(LANGUAGES))]
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        whole = sum(weights)
        return hidden, [weight / whole for weight in weights]

    def learn(self, batch: list[tuple[dict[int, float], int]], rate: float) -> float:
        """One step of gradient descent, example by example; gives the mean loss."""
        loss = 0.0
        for features, label in batch:
            hidden, chances = self.forward(features)
            loss -= math.log(max(chances[label], 1e-12))
            error = [chance - (k == label) for k, chance in enumerate(chances)]
            for unit, value in enumerate(hidden):
                row = self.second[unit]
                back = sum(row[k] * error[k] for k in range(len(LANGUAGES))) * (1 - value * value)
                for k in range(len(LANGUAGES)):
                    row[k] -= rate * error[k] * value
                for at, feature in features.items():
                    self.first[at][unit] -= rate * back * feature
        return loss / len(batch)

    def digest(self) -> str:
        """The same for the same weights, to the last bit."""
        text = json.dumps([self.first, self.second])  # Python writes floats so that they are read back exactly
        return hashlib.sha256(text.encode()).hexdigest()


def features_of(line: str) -> dict[int, float]:
    """How often pairs of letters occur, hashed into a fixed number of places."""
    found: dict[int, float] = {}
    for pair in itertools.pairwise(line):
        at = int.from_bytes(hashlib.blake2b("".join(pair).encode(), digest_size=2).digest()) % FEATURES
        found[at] = found.get(at, 0.0) + 1.0
    return {at: count / len(line) * 8 for at, count in sorted(found.items())}


def sentence(dice: random.Random) -> tuple[dict[int, float], int]:
    """A line of some words of one language, and which it is."""
    label = dice.randrange(len(LANGUAGES))
    words = WORDS[LANGUAGES[label]]
    return features_of(" ".join(dice.choice(words) for _ in range(dice.randint(2, 5)))), label


class Training:
    """The whole state of a run, which a checkpoint holds."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.model = Model(self.dice)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        version, numbers, gauss = self.dice.getstate()
        state = {
            "step": self.step,
            "first": self.model.first,
            "second": self.model.second,
            "dice": [version, list(numbers), gauss],
        }
        new = path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = json.loads(path.read_text())
        self.step, self.model.first, self.model.second = state["step"], state["first"], state["second"]
        version, numbers, gauss = state["dice"]
        self.dice.setstate((version, tuple(numbers), gauss))


def accuracy(model: Model, seed: int, count: int = 200) -> float:
    """The share of lines, never seen in training, that are told right."""
    dice = random.Random(seed + 1)
    lines = [sentence(dice) for _ in range(count)]
    right = sum(
        max(range(len(LANGUAGES)), key=model.forward(features)[1].__getitem__) == label for features, label in lines
    )
    return right / count


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--steps", type=int, default=3000)
    asked.add_argument("--seed", type=int, default=7)
    asked.add_argument("--rate", type=float, default=0.1)
    asked.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    asked.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in each step, to watch it longer")
    args = asked.parse_args()

    stopping = False

    def on_term(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True  # the step in hand is finished first

    signal.signal(signal.SIGTERM, on_term)
    checkpoints = Path(os.environ.get("TIDEMILL_CHECKPOINT_DIR", "."))
    artifacts = Path(os.environ.get("TIDEMILL_ARTIFACT_DIR", "."))
    checkpoint = checkpoints / "checkpoint.json"
    training = Training(args.seed)
    if checkpoint.exists():
        training.load(checkpoint)
    print(f"attempt {os.environ.get('TIDEMILL_ATTEMPT', '1')}: begins at step {training.step}", flush=True)
    while training.step < args.steps:
        if stopping:
            training.save(checkpoint)
            print(f"asked to go: checkpoint at step {training.step}", flush=True)
            return 0
        loss = training.model.learn([sentence(training.dice) for _ in range(BATCH)], args.rate)
        training.step += 1
        if training.step % args.every == 0:
            training.save(checkpoint)
            print(f"step {training.step}: loss {loss:.4f}", flush=True)
        if args.pause:
            time.sleep(args.pause)
    training.save(checkpoint)
    result = {
        "steps": training.step,
        "accuracy": accuracy(training.model, args.seed),
        "sha256": training.model.digest(),
    }
    new = artifacts / "result.json.new"
    new.write_text(json.dumps(result) + "\n")
    new.rename(artifacts / "result.json")
    (checkpoints / "done").touch()
    print(f"done: {result}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
