"""A model in every form that it can be shipped in, on the CPU: size, speed, and word errors in noise.

    python benchmarks/formats.py MODEL MANIFEST --noise DIR --limit 100 --out docs/log/NAME.md

PyTorch in fp32, the int8 file, and ONNX in fp32, fp16 and int8 hear the same mixtures, one at a time.
The exported files stay in --work, and what is decoded there too: stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

from dawhisper import load_model, save_model
from dawhisper.evaluation.run import EvaluateOptions, evaluate
from dawhisper.evaluation.tables import Results
from dawhisper.tools.export import export


def make(model_name: str, work: Path) -> dict[str, Path]:
    """Label -> file or folder; those that exist are kept."""
    model = load_model(model_name, device="cpu", dtype="fp32")
    forms = {f"onnx-{dtype}": work / f"onnx-{dtype}" for dtype in ("fp32", "fp16", "int8")}
    for label, folder in forms.items():
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            export(model, folder, dtype=label.removeprefix("onnx-"))
    forms = {"fp16-file": work / "fp16.safetensors", "int8-file": work / "int8.safetensors"} | forms
    for label in ("fp16-file", "int8-file"):
        if not forms[label].is_file():
            save_model(model, forms[label], dtype=label.removesuffix("-file"), base_model=model_name)
    return forms


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6


def table(results: Results, sizes: dict[str, float]) -> list[str]:
    conditions = [c.name for c in results.conditions]
    texts = {(s.hypothesis.model, s.hypothesis.condition, s.hypothesis.utterance): s.text for s in results.scored}
    first = next(iter(results.models))
    lines = [
        "| form | MB | " + " | ".join(f"WER {c}" for c in conditions) + " | same text | real-time factor |",
        "|---" * (len(conditions) + 4) + "|",
    ]
    for label in results.models:
        scores = [results.score(label, c) for c in conditions]
        mine = [key for key in texts if key[0] == label]
        same = sum(texts[key] == texts[first, key[1], key[2]] for key in mine)
        wers = " | ".join(f"{s.wer.value:.1f} [{s.wer.low:.1f}, {s.wer.high:.1f}]" for s in scores)
        speed = sum(s.rtf for s in scores) / len(scores)
        lines.append(f"| {label} | {sizes[label]:.0f} | {wers} | {same} of {len(mine)} | {speed:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or path of a checkpoint")
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--noise", nargs="+", default=[], help="recordings of noise; babble without them")
    parser.add_argument("--snr", nargs="+", type=float, default=[5.0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("formats"))
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    forms = make(args.model, args.work)
    sizes = {"fp32": megabytes(Path(args.model)) if Path(args.model).exists() else float("nan")}
    sizes |= {label: megabytes(path) for label, path in forms.items()}
    specs = [f"fp32={args.model}", *(f"{k}={v}" for k, v in forms.items())]
    results = evaluate(
        EvaluateOptions(
            manifests=args.manifests,
            models=specs,
            noise=args.noise,
            kinds=["clean", "real" if args.noise else "babble"],
            snrs=args.snr,
            limit=args.limit,
            batch_size=1,
            dtype="fp32",
            device="cpu",
            gates=False,
            plots=False,
            out=str(args.work / "evaluation"),
        )
    )
    assert results is not None  # this is the one process
    where = f"{args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
    how = "greedy, one recording at a time; fp32 is PyTorch, made from MODEL's own file"
    text = "\n".join([f"{where}; {how}.\n", *table(results, sizes)]) + "\n"
    print(text)
    if args.out:
        with args.out.open("a") as f:
            f.write(f"\n```\npython benchmarks/formats.py {' '.join(sys.argv[1:])}\n```\n\n{text}")


if __name__ == "__main__":
    main()
