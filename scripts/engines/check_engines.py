#!/usr/bin/env python3
"""Runs engines on conversions of the pico models and holds what `gqa2mla check` says to what they do.

    python3 scripts/engines/check_engines.py                           # every engine of engines.txt
    python3 scripts/engines/check_engines.py --engines mlx --cases portable fp8
    python3 scripts/engines/check_engines.py --write docs/engines.md   # and writes the table

A case is a folder: a fixture that is MLA already, or a conversion. For each, `check --json` is asked first; then the engine decodes
greedily and computes losses, and so does transformers on the same folder (for FP8, with the weights widened to f32). They
agree where the continuations are equal and no loss differs by more than 0.01 (of FP8, which some engines widen to bf16: 0.1). `yes` and `if` must come out equal, `no` must
not. Exit 1 where `check` was wrong.

Needs a release build, python3, and a package registry the first time. Environments stay in ENGINES_DIR (default target/engines).
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROMPTS = ["The capital of France is", "Once upon a time there was a", "Water boils when", "The river bends", "In the year of the"]
NEW, WINDOW, WINDOWS = 24, 192, 3
CLOSED = ("--method", "transmla", "--calib-samples", "16", "--kv-budget", "50%", "--force")


@dataclass(frozen=True)
class Case:
    """A folder to run: `options` of a conversion of `fixture`, or none for the fixture itself."""

    name: str
    fixture: str = "pico-trained"
    options: tuple[str, ...] = ()
    # Keys of config.json that are written over.
    config: dict = field(default_factory=dict, hash=False)
    fp8: bool = False
    # Engines that cannot be asked: llama.cpp's converter knows no vocabulary of a pico model with DeepSeek's own keys.
    untried: tuple[str, ...] = ()


CASES = [
    Case("portable", options=(*CLOSED, "--profile", "portable", "--pad", "none", "--dtype", "f32")),
    Case("portable-padded", options=(*CLOSED, "--profile", "portable", "--dtype", "bf16")),
    Case("portable-q-latent", options=(*CLOSED, "--profile", "portable", "--pad", "none", "--q-lora-rank", "96", "--dtype", "f32")),
    Case("portable-fp8", options=(*CLOSED, "--profile", "portable", "--dtype", "fp8"), fp8=True),
    Case("portable-v2", options=(*CLOSED, "--profile", "portable", "--pad", "none", "--target", "deepseek_v2", "--dtype", "f32")),
    Case("faithful", options=("--method", "attention-aware", "--calib-samples", "16", "--profile", "faithful", "--dtype", "f32")),
    Case("exact", options=("--method", "exact", "--force", "--dtype", "f32")),
    Case("youtu", options=(*CLOSED, "--profile", "faithful", "--target", "youtu", "--dtype", "f32")),
    Case("minicpm3", options=(*CLOSED, "--profile", "faithful", "--target", "minicpm3", "--dtype", "f32")),
    Case("native-v3", "pico-deepseek-v3", untried=("llamacpp",)),
    Case("native-v3-bias", "pico-deepseek-v3-bias", untried=("llamacpp",)),
    Case("native-v3-moe", "pico-deepseek-v3-moe", untried=("llamacpp",)),
    Case("native-v2", "pico-deepseek-v2", untried=("llamacpp",)),
    Case("native-youtu", "pico-youtu"),
]


@dataclass(frozen=True)
class Engine:
    """How an engine is run: environment, runner, what `check` calls it, options of the runner."""

    environment: str
    runner: str
    said: str
    options: tuple[str, ...] = ()


ENGINES = {
    "transformers": Engine("transformers", "run_transformers.py", "transformers"),
    "transformers-4": Engine("transformers-4", "run_transformers.py", "transformers 4"),
    "mlx": Engine("mlx", "run_mlx.py", "MLX-LM"),
    "mistralrs": Engine("mistralrs", "run_mistralrs.py", "mistral.rs"),
    "llamacpp": Engine("llamacpp", "run_llamacpp.py", "llama.cpp"),
}


def packages():
    lines = [line.split() for line in (HERE / "engines.txt").read_text().splitlines() if line and line[0] != "#"]
    return {name: wanted for name, *wanted in lines}


def python_of(name, directory):
    """Python of an environment, made where it is not there."""
    env = directory / f"engine-{name}"
    python = env / "bin/python"
    if not (env / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages()[name]], check=True)
        (env / "ready").touch()
    return python


def llama_source(directory):
    """llama.cpp's source of engines.txt, for its converter."""
    name, version = packages()["source"][0].split("==")
    root = directory / f"{name}-{version}"
    if not root.exists():
        import urllib.request

        page = urllib.request.urlopen(f"https://pypi.org/simple/{name}/").read().decode()
        url = re.search(rf'href="([^"#]*{name.replace("-", "_")}-{re.escape(version)}\.tar\.gz)', page)[1]
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "source.tar.gz"
            urllib.request.urlretrieve(url, archive)
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar if "/llama.cpp/" in m.name and m.name.endswith(".py")]
                tar.extractall(scratch, members=wanted, filter="data")
            shutil.move(next(Path(scratch).glob("*/llama.cpp")), root)
    return root


def folder_of(case, binary, work):
    """The folder of a case; made by the tool where it is a conversion."""
    out = work / case.name
    if out.exists():
        return out
    if case.options:
        command = [binary, "-q", "convert", ROOT / "fixtures" / case.fixture, "-o", out, *case.options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case.name}: convert: {done.stderr}")
    else:
        shutil.copytree(ROOT / "fixtures" / case.fixture, out)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "fixtures/pico-trained" / file, out)
    if case.config:
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | case.config))
    return out


def widened(folder, python, work):
    """The folder with its FP8 weights in f32."""
    out = work / f"{folder.name}-f32"
    if not out.exists():
        subprocess.run([python, HERE / "run/dequantise.py", folder, out], check=True)
    return out


def request_of(folder, work):
    """Ids that the folder's vocabulary has: bytes of text where it is the trained model's, arbitrary ones else."""
    config = json.loads((folder / "config.json").read_text())
    width = min(WINDOW, config["max_position_embeddings"])
    text = list((ROOT / "data/heldout.txt").read_bytes()[: width * WINDOWS])
    prompts = [list(p.encode()) for p in PROMPTS]
    clip = lambda ids: [i % config["vocab_size"] for i in ids]
    windows = [clip(text[i * width : (i + 1) * width]) for i in range(WINDOWS)]
    new = max(1, min(NEW, config["max_position_embeddings"] - 32))
    out = work / "request.json"
    out.write_text(json.dumps({"prompts": [clip(p) for p in prompts], "windows": windows, "new": new}))
    return out


def run(python, engine, folder, work, options):
    """What the engine answers, or the last line of why it does not."""
    result = work / "result.json"
    result.unlink(missing_ok=True)
    command = [python, HERE / "run" / engine.runner, folder, request_of(folder, work), result, *engine.options, *options]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=work, env=env, timeout=600)
    except subprocess.TimeoutExpired:
        return None, "does not end within ten minutes"
    if done.returncode or not result.exists():
        return None, reason(done)
    return json.loads(result.read_text()), ""


def reason(done):
    """The line of what an engine printed that says why it ended: an error of its own before Python's last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    own = [line for line in lines if re.match(r"(\S+: )?(GGML_ASSERT|ERROR|Error|error:|.*GGML_ASSERT\(|.*panicked at)", line)]
    python = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    last = (own or python or lines or [f"exit code {done.returncode}"])[0 if own else -1]
    return last[:200].replace("|", "/").replace(str(Path.home()), "~")


def compare(got, reference, within):
    """(equal, what was seen); losses of a token may differ by `within`."""
    if "texts" in got:
        # Generated text ends where a token is no text; what is there has to begin alike.
        wanted = [bytes(i for i in line if i < 256).decode(errors="replace") for line in reference["continuations"]]
        same = sum(a[:12] == b[:12] for a, b in zip(got["texts"], wanted))
        return same == len(wanted), f"{same} of {len(wanted)} texts equal"
    same = sum(a == b for a, b in zip(got["continuations"], reference["continuations"]))
    pairs = [(a, b) for x, y in zip(got["losses"], reference["losses"]) for a, b in zip(x, y)]
    worst = max(abs(a - b) for a, b in pairs) if all(a == a for a, _ in pairs) else float("nan")
    seen = f"{same} of {len(got['continuations'])} continuations equal, losses within {worst:.1e}"
    return same == len(got["continuations"]) and worst <= within, seen


def verdict_of(binary, folder, engine):
    done = subprocess.run([binary, "check", folder, "--json"], capture_output=True, text=True)
    verdicts = json.loads(done.stdout)["engines"]
    return next(((v["loads"], v["reasons"]) for v in verdicts if v["engine"] == engine.said), ("none", []))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--cases", nargs="*", default=[c.name for c in CASES])
    parser.add_argument("--binary", default=str(ROOT / "target/release/gqa2mla"))
    parser.add_argument("--write", type=Path, help="file that the table is written to")
    args = parser.parse_args()
    directory = Path(os.environ.get("ENGINES_DIR", ROOT / "target/engines")).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="engines-"))
    cases = {c.name: c for c in CASES}
    rows, wrong = [], 0
    try:
        reference_python = python_of("transformers", directory)
        for name in args.cases:
            case = cases[name]
            folder = folder_of(case, args.binary, work)
            plain = widened(folder, reference_python, work) if case.fp8 else folder
            reference, why = run(reference_python, ENGINES["transformers"], plain, work, ())
            if reference is None:
                raise SystemExit(f"{name}: the reference does not run: {why}")
            # Transformers is held to its own oldest version, where that knows the class.
            older, _ = run(python_of("transformers-4", directory), ENGINES["transformers-4"], plain, work, ())
            for label in (e for e in args.engines if e not in case.untried):
                engine = ENGINES[label]
                options = ()
                if label == "llamacpp":
                    options = (f"source={llama_source(directory)}", f"python={python_of('transformers-4', directory)}")
                said, reasons = verdict_of(args.binary, folder, engine)
                got, failed = run(python_of(engine.environment, directory), engine, folder, work, options)
                equal, seen = compare(got, (older or reference) if label == "transformers" else reference, 0.1 if case.fp8 else 0.01) if got else (False, f"fails: {failed}")
                right = (said != "no") == equal and said != "none"
                wrong += not right
                cache = "" if not got or got["cache"] is None else got["cache"]
                rows.append((label, name, said, seen, cache, right))
                print(f"{'ok   ' if right else 'WRONG'} {label:14} {name:18} check says {said:13} {seen} cache {cache}", flush=True)
                if not right:
                    print("\n".join(f"      {r}" for r in reasons), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.write:
        args.write.write_text(table(rows))
    return 1 if wrong else 0


def table(rows):
    """docs/engines.md"""
    versions = "\n".join(f"| `{n}` | {' '.join(f'`{p}`' for p in p_)} |" for n, p_ in packages().items())
    lines = "\n".join(f"| {e} | {c} | {s} | {seen} | {cache} |" for e, c, s, seen, cache, _ in rows)
    cases = "\n".join(
        f"| {c.name} | {c.fixture} | {'as it is' if not c.options else '`' + ' '.join(c.options) + '`'} |" for c in CASES
    )
    return f"""# What engines do with conversions

<!-- Made by `python3 scripts/engines/check_engines.py --write docs/engines.md`. -->

Each row is a run, on a CPU, of {datetime.date.today()}: greedy continuations of five prompts and the losses of {WINDOW * WINDOWS} tokens,
beside stock transformers on the same folder (for FP8, with the weights widened to f32). "check" is what `gqa2mla check` says before.
The cache is in values per token and layer, as the engine allocates it.

| engine | case | check | seen | cache |
|---|---|---|---|---|
{lines}

## Cases

| case | fixture | conversion |
|---|---|---|
{cases}

## Versions

| environment | packages |
|---|---|
{versions}
"""


if __name__ == "__main__":
    sys.exit(main())
