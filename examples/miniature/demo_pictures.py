"""Draws the pictures that `make demo` asks about, into `examples/images/miniature`. No training saw them."""

import json
import random
from pathlib import Path

from language import READ
from moe_skills import SKILLS, ask
from mole_domains import DOMAINS, encode
from world import draw_scene


PICTURES = Path(__file__).resolve().parents[1] / "images" / "miniature"
ELONGATED = ((256, 64), (64, 256), (192, 64), (64, 192), (256, 64))


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    rng = random.Random("demo")
    questions: dict[str, list[dict[str, str]]] = {"uhd": [], "moe": [], "mole": []}
    for index, size in enumerate(ELONGATED):
        scene = draw_scene(rng, size, (13, 16), dark=False)
        add(questions["uhd"], scene.image, f"elongated_{index}.png", READ, scene.number)
    # Who lives at a number is nothing that a picture shows.
    for index, skill in enumerate(skill for skill in SKILLS if skill != "residents"):
        asked = None
        while asked is None:
            scene = draw_scene(rng, (64, 64), (12, 28))
            asked = ask(rng, skill, scene)
        add(questions["moe"], scene.image, f"skill_{index}.png", *asked)
    for domain, ink in DOMAINS.items():
        for index in range(2):
            scene = draw_scene(rng, (64, 64), (12, 28), dark=False, inks=(ink,))
            add(questions["mole"], scene.image, f"{domain}_{index}.png", READ, encode(domain, scene.number))
            questions["mole"][-1]["domain"] = domain
    (PICTURES / "questions.json").write_text(json.dumps(questions, indent=1) + "\n", encoding="utf-8")


def add(questions: list[dict[str, str]], image, name: str, question: str, answer: str) -> None:
    image.save(PICTURES / name)
    questions.append({"image": name, "question": question, "answer": answer})


if __name__ == "__main__":
    main()
