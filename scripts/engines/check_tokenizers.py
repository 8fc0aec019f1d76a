#!/usr/bin/env python3
"""Whether `AutoTokenizer` gives the same ids for a conversion as for its source, for every target, in this transformers.

    python scripts/engines/check_tokenizers.py                      # tokenizers that are made here, under the pico models
    python scripts/engines/check_tokenizers.py SmolLM2-135M ...     # and those of these folders

Which class loads a tokenizer depends on the version, on `model_type` and on `tokenizer_class`, and some classes rebuild
what tokenizer.json says; see `src/target/tokenizer.rs`. Compared are ids, what they decode to, ids of special tokens and
chats. Exit 1 where anything differs. Needs a release build.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
TARGETS = ["deepseek_v3", "deepseek_v2", "youtu", "minicpm3", "hf-remote"]
NEW_IN_5 = ("youtu", "minicpm3")
TEXTS = [
    "Hello world", " leading and  double  spaces\n\n\ttabs ", "It's 12345 + 67.89 = don't, I'LL", "", " ", "\n",
    "naïve café ﬁ Å e\u0301 ½ ² İ", "日本語 русский العربية 🙂‍↔️", "def f(x):\n    return x**2\r\n", "▁a _b ▁", "a\u00a0b\u2028c",
    "HTTPServer2 camelCase 3.14e-10", "<|endoftext|>a <|endoftext|> b", "<s>[INST] x [/INST]</s> y", "<bos>x<eos>",
    "<|im_start|>user\nhi 42<|im_end|>\n",
]
CHAT = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42."}]
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"


def of_bytes(digits: bool, nfc: bool = False) -> Tokenizer:
    """Byte-level pairs, as GPT-2 and its kin have them."""
    made = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.normalizer = normalizers.NFC() if nfc else None
    made.decoder = decoders.ByteLevel()
    # Split and joined, so that there are merges over digits and punctuation to be kept apart or not.
    learner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    keep, made.pre_tokenizer = made.pre_tokenizer, learner
    train(made, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet())
    made.pre_tokenizer = keep
    return made


def of_pieces(tokens: list[str], prefix: bool) -> Tokenizer:
    """Pieces with bytes to fall back on, as converted from SentencePiece."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    train(made, [*tokens, *(f"<0x{i:02X}>" for i in range(256))], [])
    text = json.loads(made.to_str())
    # Bytes are pieces, not special tokens.
    text["added_tokens"] = [t for t in text["added_tokens"] if not t["content"].startswith("<0x")]
    text["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(text))
    first = tokens[1]
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, made.token_to_id(first))]
    )
    return made


def train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False, initial_alphabet=alphabet,
                                  special_tokens=[AddedToken(t, special=True, normalized=False) for t in special])
    text = (ROOT / "data/calib.txt").read_text()[:200_000]
    numbers = "".join(f"{i * i} {i}.{i % 7} x{i} " for i in range(3000))
    tokenizer.train_from_iterator([text, numbers, *TEXTS], trainer)


# (fixture, tokenizer, tokenizer_class, more of tokenizer_config.json)
GPT = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
NAMED = GPT | {"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
SP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
CASES = [
    ("llama", "digits", "GPT2Tokenizer", GPT), ("llama", "digits", "GPT2TokenizerFast", GPT),
    ("llama", "digits", "PreTrainedTokenizerFast", GPT), ("llama", "plain", "GPT2Tokenizer", GPT),
    ("llama", "digits", None, NAMED | {"add_bos_token": False}),
    ("llama", "pieces", "LlamaTokenizer", SP), ("llama", "pieces", "LlamaTokenizerFast", SP | {"legacy": True}),
    ("llama3", "digits", "PreTrainedTokenizerFast", GPT),
    ("qwen2", "digits", "Qwen2Tokenizer", GPT | {"pad_token": "<|endoftext|>"}),
    ("qwen2", "digits", "PreTrainedTokenizerFast", GPT), ("qwen2", "digits", None, GPT),
    ("qwen3", "nfc", "Qwen2Tokenizer", GPT), ("qwen3", "digits", "Qwen2TokenizerFast", GPT),
    ("qwen2-moe", "digits", "Qwen2Tokenizer", GPT),
    ("gemma2", "gemma", "GemmaTokenizer", {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                                           "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}),
    ("mistral", "pieces", "LlamaTokenizer", SP), ("mixtral", "pieces", "LlamaTokenizerFast", SP),
    ("phi3", "pieces", "LlamaTokenizer", SP), ("granite", "digits", "GPT2Tokenizer", NAMED),
    ("olmo2", "digits", "GPT2Tokenizer", GPT), ("olmo2", "plain", "PreTrainedTokenizerFast", GPT),
]
MAKERS = {
    "digits": lambda: of_bytes(True), "plain": lambda: of_bytes(False), "nfc": lambda: of_bytes(True, True),
    "pieces": lambda: of_pieces(["<unk>", "<s>", "</s>"], True),
    "gemma": lambda: of_pieces(["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"], False),
}


def result(folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "ids": ids,
        "ids without special tokens": [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS],
        "text": [tokenizer.decode(i) for i in ids],
        "special tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None,
        "size": len(tokenizer),
        "class": type(tokenizer).__name__,
    }


def source_of(name: str, fixture: str, tokenizer: Path, work: Path, config: dict) -> Path:
    """A pico model with another tokenizer: only what is beside the weights is looked at."""
    source = work / f"{name}-source"
    if not source.exists():
        shutil.copytree(ROOT / "fixtures" / f"pico-{fixture}", source)
        for file in tokenizer.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and "config.json" != file.name:
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, source)
        own = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(own | config))
    return source


# Where the source is of no use to compare with: 5.0.0 takes CodeLlama's class for a llama that names none.
KNOWN = {("llama-digits-None", (5, 0))}


def check(name: str, source: Path, work: Path, binary: Path) -> list[str]:
    """Complaints about the conversions of `source` to every target that takes it."""
    if (name, VERSION) in KNOWN:
        print(f"{name:44} not compared in this version")
        return []
    bad, seen = [], 0
    try:
        expected = result(source)
    except Exception as e:  # noqa: BLE001: a source that cannot be loaded sets nothing to compare with
        print(f"{name:44} the source does not load: {type(e).__name__}")
        return []
    named = {"bos_token", "eos_token"} <= json.loads((source / "tokenizer_config.json").read_text()).keys()
    loaded = []
    for target in TARGETS:
        if VERSION < (5, 0) and target in NEW_IN_5:
            continue
        out = work / f"{name}-{target}"
        if not out.exists():
            done = subprocess.run([binary, "convert", source, "-o", out, "--method", "exact", "--target", target, "-q"],
                                  capture_output=True, text=True)
            if done.returncode:
                continue
        seen += 1
        try:
            made = result(out)
        except Exception as e:  # noqa: BLE001
            bad.append(f"{target}: does not load: {type(e).__name__}: {str(e).splitlines()[0][:120]}")
            continue
        loaded.append(made["class"])
        for key, value in expected.items():
            if key == "class" or value == made[key]:
                continue
            # Tokens without a name are those of the class, which older versions choose otherwise.
            if key == "special tokens" and not named and VERSION < (5, 9):
                continue
            which = ""
            if isinstance(value, list) and len(value) == len(TEXTS):
                which = f" of {next(t for t, a, b in zip(TEXTS, value, made[key]) if a != b)!r}"
            bad.append(f"{target}: {key}{which}: {made['class']} for {expected['class']}")
    if not seen:
        bad.append("no target takes it")
    print(f"{name:44} {expected['class']:22} {seen} targets {'same' if not bad else 'DIFFER'} ({', '.join(sorted(set(loaded)))})",
          flush=True)
    for line in bad:
        print(f"    {line}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="models whose tokenizers are looked at too")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/gqa2mla")
    parser.add_argument("--work", type=Path, help="keep conversions here, and take those that are there")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    binary, bad = args.binary.resolve(), []
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for fixture, kind, name, more in CASES:
            folder = work / f"tokenizer-{kind}"
            if not folder.exists():
                folder.mkdir()
                MAKERS[kind]().save(str(folder / "tokenizer.json"))
            label = f"{fixture}-{kind}-{name}{'-legacy' if more.get('legacy') else ''}"
            source = source_of(label, fixture, folder, work, {})
            config = more | ({"tokenizer_class": name} if name else {})
            (source / "tokenizer_config.json").write_text(json.dumps(config))
            bad += check(label, source, work, binary)
        for folder in args.folders:
            model_type = json.loads((folder / "config.json").read_text())["model_type"]
            fixture = model_type.replace("_", "-")
            bad += check(folder.name, source_of(folder.name, fixture, folder, work, {}), work, binary)
    print(f"transformers {transformers.__version__}: {len(bad)} differences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
