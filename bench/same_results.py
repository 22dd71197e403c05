"""Whether two versions of Luthier give the same results: commands run by each, and what they leave compared.

    python -m bench.same_results keep FOLDER [--renamed FILE]       # by the interpreter that runs it
    python -m bench.same_results compare BEFORE AFTER [--renamed FILE]

`FILE` is JSON, old name → new name of options that were renamed: they are written anew in the commands, and in
configs and texts before they are compared. Final weights are compared by SHA-256.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TRAIN = "train model.path=base model.dtype=float32 data=jsonl batch_size=4 max_steps=3 log_every=1 tracker=[metrics]"
SFT = f"{TRAIN} data.path=rows.jsonl optimiser.lr=1e-2"
PAIRS = f"{TRAIN} data.path=pairs.jsonl optimiser.lr=1e-3"
HELD = "data@eval_data=jsonl eval_data.path=held_rows.jsonl evaluation.max_new_tokens=4"
ONLINE = (
    f"{SFT} reward_model=[length,missing_end] objective.max_new_tokens=6 objective.rollout=4 objective.reuse=2"
    " objective.n=2 objective.together=4"
)
MERGE = "merge models={a: lora, b: other} base=base"

VERBS = ("train", "evaluate", "sample", "merge", "fold", "preview", "plan")

COMMANDS: dict[str, str] = {
    "help": "--help",
    **{f"help-{verb}": f"{verb} --help" for verb in VERBS},
    "help-lora": "train adapter=lora objective=ppo optimiser=galore --help",
    "lora": f"{SFT} adapter=lora adapter.rank=4 {HELD} evaluation.every=2 run_dir=lora",
    "other": f"{SFT} adapter=lora adapter.rank=4 seed=1 run_dir=other",
    "full": f"{SFT} adapter=full run_dir=full",
    "dora": f"{SFT} adapter=dora adapter.rank=4 run_dir=dora",
    "vera": f"{SFT} adapter=vera run_dir=vera",
    "galore": f"{SFT} adapter=full optimiser=galore optimiser.rank=4 run_dir=galore",
    "adamw_8bit": f"{SFT} adapter=full optimiser=adamw_8bit run_dir=adamw_8bit",
    "paged_adamw": f"{SFT} optimiser=paged_adamw run_dir=paged_adamw",
    "paged_adamw_8bit": f"{SFT} optimiser=paged_adamw_8bit run_dir=paged_adamw_8bit",
    "lion": f"{SFT} optimiser=lion run_dir=lion",
    "nf4": f"{SFT} quantiser=nf4 run_dir=nf4",
    "int8": f"{SFT} quantiser=int8 run_dir=int8",
    **{
        name: f"{PAIRS} objective={name} {HELD.replace('held_rows', 'held_pairs')} run_dir={name}"
        for name in ("dpo", "ipo", "orpo", "simpo", "cpo", "reward")
    },
    "dpo-also": f"{PAIRS} objective=dpo also.sft=0.5 run_dir=dpo_also",
    "kto": f"{TRAIN} objective=kto data.path=labels.jsonl run_dir=kto",
    "process_reward": f"{TRAIN} objective=process_reward data.path=steps.jsonl run_dir=process_reward",
    "ppo": f"{ONLINE} objective=ppo {HELD} run_dir=ppo",
    "outcome": f"{ONLINE} objective=ppo reward_model=[outcome] reward_models.outcome.model=reward run_dir=outcome",
    "process": f"{ONLINE} objective=ppo reward_model=[process] reward_models.process.model=process_reward"
    " run_dir=process",
    "csv": f"{SFT} data=csv data.path=rows.csv run_dir=csv",
    "json": f"{SFT} data=json data.path=rows.json run_dir=json",
    "folder": f"{SFT} data=folder data.path=many run_dir=folder row_filter=[exact_duplicates]",
    "mixture": f"{TRAIN.replace('jsonl', 'mixture')} data.sources={{a: {{name: jsonl, path: rows.jsonl}}, b: {{name: csv, path: rows.csv}}}}"
    " run_dir=mixture",
    "reasoning": f"{TRAIN} data=reasoning_gym data.task=chain_sum data.size=8 run_dir=reasoning",
    "stages": f"{SFT} model.path=staged before.one='train model.path=base data=jsonl data.path=rows.jsonl max_steps=1"
    " adapter=full model.dtype=float32 run_dir=staged tracker=[]' run_dir=after_stage",
    "longer": "train resume=lora max_steps=5",
    "multirun": f"{SFT.replace('train', 'train -m', 1)} adapter=lora,full hydra.sweep.dir=sweep",
    "evaluate": "evaluate model.path=lora model.dtype=float32 data=jsonl data.path=rows.jsonl run_dir=evaluate"
    " evaluation.max_new_tokens=4",
    "evaluate-ppo": "evaluate model.path=base objective=ppo data=jsonl data.path=rows.jsonl run_dir=evaluate_ppo",
    "sample": "sample model.path=lora model.dtype=float32 data=jsonl data.path=rows.jsonl n=2 max_new_tokens=4"
    " reward_model=[verifier,length] out=answers.jsonl",
    "majority": "sample model.path=lora model.dtype=float32 prompt=hello n=3 max_new_tokens=4 selector=majority",
    "fold": "fold model.path=lora out=folded dtype=float32",
    "soup": "merge models=[lora,other] merger=soup run_dir=soup",
    "task": f"{MERGE} merger=task_arithmetic run_dir=task",
    "ties": f"{MERGE} merger=ties run_dir=ties",
    "dare": f"{MERGE} merger=dare run_dir=dare",
    "slerp": "merge models=[lora,other] merger=slerp run_dir=slerp",
    "merged-adapter": f"{MERGE} merger=task_arithmetic result=adapter run_dir=merged_adapter",
    "preview": "preview model.path=base data=jsonl data.path=rows.jsonl html=null examples=2",
    "plan": "plan model.path=base memory_gb=8 tflops=1",
    "plugins": "plugins",
    "typo": f"{SFT} adapter.rnk=4",
    "verb": "trian",
    "method": f"{SFT} adapter=lra",
    "missing": f"{TRAIN} data.path=nowhere.jsonl",
    "range": f"{SFT} batch_size=0",
    "pair": f"{SFT} adapter=full quantiser=nf4",
    "once": "fold -m model.path=lora out=x",
}
"""Name → command line, in order: later ones use what earlier ones left."""
KEPT = ("config.yaml", "metrics.jsonl", "summary.json", "fold.json")
NOISE = re.compile(
    r"second|memory|speed|efficien|started|ended|created|^versions|host|python|time|peak|pid", re.IGNORECASE
)
"""Keys of measurements that no two runs share."""


def main() -> int:
    """Keep or compare; the exit status is 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("keep", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--renamed", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    renamed = json.loads(options.renamed.read_text()) if options.renamed else {}
    if options.what == "keep":
        return keep(options.folders[0].absolute(), renamed, options.only)
    return compare(*options.folders, renamed)


def keep(folder: Path, renamed: dict[str, str], only: list[str]) -> int:
    """Run the commands in a folder of their own, and write what came out to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    prepare(work)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for name, line in COMMANDS.items():
        if only and name not in only:
            continue
        started = {path for path in work.rglob("*") if path.is_file()}
        words = [rewritten(word, renamed) for word in split(line)]
        done = subprocess.run(
            [sys.executable, "-m", "luthier", *words],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
        )
        files = sorted(path for path in work.rglob("*") if path.is_file() and path not in started)
        if name == "longer":
            files = sorted((work / "lora").rglob("*"))
        kept = {
            "command": line,
            "status": done.returncode,
            "text": plain(done.stdout + done.stderr, work),
            "files": dict(contents(files, work)),
        }
        (folder / f"{name}.json").write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False))
        print(f"{name:16} {done.returncode}  {len(kept['files'])} files", flush=True)
    return 0


def prepare(work: Path) -> None:
    """Write the tiny model and its rows."""
    from luthier.testing.models import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tiny_llama(0, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(
        work / "base"
    )
    tokenizer.save_pretrained(work / "base")
    letters = "abcdefghij"
    rows = [{"prompt": f"{a} ->", "completion": f" {b}", "answer": b} for a, b in itertools.pairwise(letters)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " zz"} for row in rows]
    labels = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows)]
    steps = [{"prompt": row["prompt"], "steps": ["one", "two"], "labels": [True, False]} for row in rows]
    for name, given in {"rows": rows, "pairs": pairs, "labels": labels, "steps": steps}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    for name, given in {"held_rows": rows, "held_pairs": pairs}.items():
        new = [{**row, "prompt": f"held {row['prompt']}"} for row in given[:4]]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    (work / "rows.json").write_text(json.dumps(rows))
    (work / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
    )
    (work / "many").mkdir()
    (work / "many" / "a.jsonl").write_text((work / "rows.jsonl").read_text())


def split(line: str) -> list[str]:
    """Split a command line at spaces that are outside quotes and braces."""
    words, depth, quoted = [""], 0, False
    for character in line:
        depth += (character == "{") - (character == "}")
        quoted ^= character == "'"
        if character == " " and not depth and not quoted:
            words.append("")
        else:
            words[-1] += character
    return words


def rewritten(text: str, renamed: dict[str, str]) -> str:
    """Return `text` with the renamed options."""
    for old, new in renamed.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w])", new, text)
    return text


def plain(text: str, work: Path) -> str:
    """Return what was printed without escapes, folders, and numbers that are measured."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(work), "WORK")
    text = re.sub(r"[\d,.]+(?= ?(tok/s|MB|GB|s\b|TFLOP|min|h\b|%))", "#", text)
    return re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "NOW", text)


def contents(files: list[Path], work: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is compared of every file by its path."""
    for path in files:
        name = str(path.relative_to(work))
        # A rollout file and a checkpoint hold times.
        if path.suffix == ".safetensors" and not {"checkpoints", "rollouts"} & set(path.parts):
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            yield name, [quiet(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in KEPT and path.suffix == ".json":
            yield name, quiet(json.loads(path.read_text()))
        elif path.name in KEPT:
            yield name, path.read_text().replace(str(work), "WORK")


def quiet(value: Any) -> Any:
    """Return `value` without keys of what is measured."""
    if isinstance(value, dict):
        return {key: quiet(inner) for key, inner in value.items() if not NOISE.search(key)}
    return [quiet(inner) for inner in value] if isinstance(value, list) else value


def shown(file: Path, renamed: dict[str, str]) -> list[str]:
    """Return the lines of a kept command: configs as dotted options, and what was printed word by word."""
    kept = json.loads(re.sub(re.escape(tempfile.gettempdir()) + r"/tmp\w+", "WORK", file.read_text()))
    dotted = {old: new for old, new in renamed.items() if "." in old}
    kept["text"] = rewritten(kept["text"], dotted).split()
    for name, content in kept["files"].items():
        if name.endswith(".yaml"):
            lines = [f"{key}: {value}" for key, value in leaves(yaml.safe_load(content))]
            kept["files"][name] = sorted(rewritten(line, renamed) for line in lines)
    kept.pop("command")
    return json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False).splitlines()


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a config by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def compare(before: Path, after: Path, renamed: dict[str, str]) -> int:
    """Print where two kept folders differ."""
    differing = 0
    for name in COMMANDS:
        texts = []
        for folder, names in ((before, renamed), (after, {})):
            file = folder / f"{name}.json"
            texts.append(shown(file, names) if file.exists() else ["not kept"])
        lines = [
            one
            for one in difflib.unified_diff(*texts, lineterm="", n=0)
            if not one.startswith(("---", "+++", "@@"))
        ]
        if lines:
            differing += 1
            print(f"== {name}")
            print("\n".join(line[:600] for line in lines[:40]))
    print(f"{differing} of {len(COMMANDS)} commands differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
