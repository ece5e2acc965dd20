"""Makes side_files.json: what `transformers` makes of random files beside a tokenizer.json.

    python tests/golden/make_side_files.py

Needs torch and transformers. Every case is a folder with one byte-level vocabulary; what differs is
the added tokens and the post-processor of tokenizer.json, and which tokens tokenizer_config.json,
special_tokens_map.json and added_tokens.json name, with which flags.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
CASES = 100
# The first three are added tokens of tokenizer.json, the next two only in its vocabulary.
NAMES = ["<s>", "</s>", "<unk>", "<tool>", "low", "<|im_start|>", "<|im_end|>", "<pad>"]
ROLES = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "image_token"]
FLAGS = ["single_word", "lstrip", "rstrip", "normalized"]
TEXTS = [
    "low <|im_start|> low<|im_end|>slow <tool>x",
    "  <unk>  </s> <pad>low low",
    "a<|im_start|>b <s> c<tool>\n<pad>",
]


def base() -> dict:
    tokens = [*NAMES[:5], *sorted(pre_tokenizers.ByteLevel.alphabet()), "lo"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("l", "o"), ("lo", "w")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(NAMES[:3])
    return json.loads(backend.to_str())


def flags(chance: random.Random) -> dict:
    return {flag: chance.random() < 0.25 for flag in FLAGS}


def entry(chance: random.Random, name: str, *, special: bool | None = None) -> dict:
    chosen = chance.random() < 0.7 if special is None else special
    return {"content": name, "special": chosen, **flags(chance)}


def role(chance: random.Random, name: str, *, typed: bool) -> object:
    if chance.random() < 0.5:
        return name
    return ({"__type": "AddedToken"} if typed else {}) | entry(chance, name)


def case(chance: random.Random, size: int) -> dict:
    """The files of one folder."""
    description, config, files = {}, {}, {}
    begins = chance.choice([None, None, "<s>", "bos"])
    if begins is not None:
        description["begins_with"] = "<s>"
        config["bos_token"] = "<s>"
    if chance.random() < 0.3:
        description["added_tokens"] = [
            {"id": i} | entry(chance, NAMES[i], special=True) for i in range(3)
        ] + [{"id": 3} | entry(chance, "<tool>")] * (chance.random() < 0.5)
    for name in chance.sample(ROLES[1:], chance.randrange(4)):
        config[name] = role(chance, chance.choice(NAMES), typed=True)
    if chance.random() < 0.3:
        key = chance.choice(["additional_special_tokens", "extra_special_tokens"])
        config[key] = chance.sample(NAMES, 2)
    elif chance.random() < 0.2:
        config["extra_special_tokens"] = {"audio_token": chance.choice(NAMES)}
    for key in ("add_bos_token", "add_eos_token"):
        if chance.random() < 0.3:
            config[key] = chance.random() < 0.5
    new = chance.sample(NAMES[5:], chance.randrange(3))
    if chance.random() < 0.35:
        config["added_tokens_decoder"] = {
            str(i): entry(chance, NAMES[i]) for i in chance.sample(range(5), 2)
        } | {str(size + i): entry(chance, name) for i, name in enumerate(new)}
    elif chance.random() < 0.5:
        files["added_tokens"] = {name: size + i for i, name in enumerate(new)}
    if chance.random() < 0.5:
        files["special_tokens_map"] = {
            name: role(chance, chance.choice(NAMES), typed=False)
            for name in chance.sample(ROLES[1:], chance.randrange(3))
        }
        if chance.random() < 0.4:
            files["special_tokens_map"]["additional_special_tokens"] = chance.sample(NAMES, 2)
    return {"tokenizer": description, "tokenizer_config": config, **files}


def write(folder: Path, description: dict, files: dict) -> None:
    """Write a folder; the test does the same."""
    changes = dict(files["tokenizer"])
    if begins := changes.pop("begins_with", None):
        changes["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": begins, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {begins: {"id": begins, "ids": [0], "tokens": [begins]}},
        }
    for name, value in (files | {"tokenizer": description | changes}).items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def outcome(description: dict, files: dict) -> dict | None:
    """What transformers says of a folder, None where it fails."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), description, files)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (TypeError, AttributeError):
            return None
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {
        "names": tokenizer.special_tokens_map,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "numbers": {name: tokenizer.get_vocab().get(name) for name in NAMES},
        "ids": ids,
        "shown": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ids],
    }


def main() -> None:
    chance, description, cases = random.Random(5), base(), []
    size = len(description["model"]["vocab"])
    while len(cases) < CASES:
        files = case(chance, size)
        files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
        if found := outcome(description, files):
            cases.append({"files": files, **found})
    head = {"made with": f"transformers {transformers.__version__}", "texts": TEXTS}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append(f'"tokenizer": {json.dumps(description, separators=(",", ":"))}')
    rows = ",\n".join(json.dumps(one, separators=(",", ":")) for one in cases)
    lines.append(f'"cases": [\n{rows}\n]')
    (HERE / "side_files.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
