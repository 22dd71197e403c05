"""Solutions with a wrong step for process reward models: ``python -m bench.steps OUT [--size N] [--seed S]``.

The worked solutions of reasoning-gym's gsm_symbolic, step by step. In most of them the result of one step is
another number: its label is 0, that of every step before it 1, and the solution ends there.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

WRONG = 0.8
"""Share of the solutions that go wrong."""
RESULT = re.compile(r"(=\s*[€$£]?)(\d+(?:\.\d+)?)(?!.*=)")
"""The number behind the last equals sign of a step."""


def corrupted(step: str, generator: random.Random) -> str | None:
    """Return `step` with another result; None where it has none."""
    found = RESULT.search(step)
    if found is None:
        return None
    value = float(found[2])
    while True:
        other = value + generator.choice((-1, 1)) * generator.choice((1, 2, 10, max(1, round(value / 4))))
        if 0 <= other != value:
            break
    text = f"{other:g}" if other != int(other) else str(int(other))
    return f"{step[: found.start(2)]}{text}{step[found.end(2) :]}"


def row(entry: dict[str, Any], generator: random.Random) -> dict[str, Any] | None:
    """Return the row of one problem; None where no step has a result."""
    solution: str = entry["metadata"]["answer_cot"]
    steps = [line.strip() for line in solution.splitlines() if line.strip() and not line.startswith("####")]
    changed = {place: other for place, step in enumerate(steps) if (other := corrupted(step, generator))}
    if not changed:
        return None
    labels = [1] * len(steps)
    if generator.random() < WRONG:
        place = generator.choice(sorted(changed))
        steps, labels = [*steps[:place], changed[place]], [*labels[:place], 0]
    prompt = [{"role": "user", "content": entry["question"]}]
    return {"prompt": prompt, "steps": steps, "labels": labels}


def main() -> int:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import reasoning_gym

    generator = random.Random(options.seed)
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=options.size, seed=options.seed)
    rows = [made for entry in problems if (made := row(entry, generator))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    wrong = sum(label == 0 for one in rows for label in one["labels"])
    print(f"{len(rows)} solutions, {sum(len(one['steps']) for one in rows)} steps, {wrong} of them wrong")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
