"""The results of an evaluation as tables and files. All of them are written from one `Results`."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .conditions import Condition
from .figures import draw_results
from .gates import GateSummary, over_layers
from .metrics import Interval
from .scores import NOISY_MEAN, Paired, Score, Scored

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows
FEW_UTTERANCES, FEW_SPEAKERS = 50, 5  # with fewer a p value is no proof
TEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


@dataclass(frozen=True)
class Results:
    """All that an evaluation found. `models` maps labels to what was loaded; the first one is the baseline."""

    options: dict[str, Any]
    models: dict[str, str]
    conditions: list[Condition]
    scores: list[Score]
    comparisons: list[Paired]
    gates: list[GateSummary]
    scored: list[Scored]

    def score(self, model: str, condition: str, group: str = "all") -> Score:
        """One cell; KeyError where there is none."""
        for s in self.scores:
            if (s.model, s.condition, s.group) == (model, condition, group):
                return s
        raise KeyError((model, condition, group))


def write_results(results: Results, folder: Path, plots: bool = True) -> None:
    """results.txt, .md, .tex, .json and .csv and the plots into the folder; the text also goes to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, above = make_tables(results), [heading(results), *cautions(results)]
    text = "\n\n".join([*above, *map(as_text, tables)]) + "\n"
    notes = draw_results(results, folder) if plots else []
    print(text)
    for note in notes:
        print(note)
    print(f"results are in {folder}")
    (folder / "results.txt").write_text(text, "utf-8")
    (folder / "results.md").write_text("\n\n".join([*above, *map(as_markdown, tables)]) + "\n", "utf-8")
    (folder / "results.tex").write_text("\n\n".join(map(as_latex, tables)) + "\n", "utf-8")
    (folder / "results.csv").write_text(as_csv(results), "utf-8")
    (folder / "results.json").write_text(json.dumps(all_values(results), ensure_ascii=False, indent=1) + "\n", "utf-8")


# ---- tables -------------------------------------------------------------------------------------------------------


def heading(results: Results) -> str:
    o = results.options
    utterances = {s.item.id: s for s in results.scored}.values()
    minutes = sum(s.item.seconds for s in utterances) / 60
    decoding = "with temperature fallback" if o["fallback"] else "at temperature 0"
    search = f"{o['beam_size']} beams" if o["beam_size"] else "greedy"
    if o["rerank"]:
        search += f", ranked by {o['rerank']}"
    return (
        f"{len(utterances)} utterances, {minutes:.1f} minutes; {search}, {decoding}; batches of {o['batch_size']}; "
        f"mixtures of seed {o['seed']}. WER and CER in %, with 95% bootstrap intervals over utterances."
    )


def cautions(results: Results) -> list[str]:
    """What speaks against believing the p values."""
    if not results.comparisons:
        return []
    items = {s.item.id: s.item for s in results.scored}.values()
    speakers = {item.utterance.speaker for item in items}
    known = len(speakers) if None not in speakers else None
    if len(items) >= FEW_UTTERANCES and (known is None or known >= FEW_SPEAKERS):
        return []
    of = "of speakers unknown" if known is None else f"of {known} speaker{'s' * (known > 1)}"
    return [
        f"Caution: p values and intervals rest on {len(items)} utterances {of}: they tell how this set came about, "
        f"not what other speakers would give. Take {FEW_UTTERANCES} utterances of {FEW_SPEAKERS} speakers or more."
    ]


def make_tables(results: Results) -> list[Table]:
    tables = [_pivot(results), _wer(results), _errors(results), _noise_only(results), _comparisons(results)]
    groups = list(dict.fromkeys(s.group for s in results.scores if s.group != "all"))
    tables += [_wer(results, group) for group in groups]
    tables.append(_speed(results))
    tables += [table for summary in results.gates for table in (_gates(summary), _correlations(summary))]
    return [table for table in tables if table[2]]


def _spoken(results: Results) -> list[str]:
    names = [c.name for c in results.conditions if c.kind != "noise-only"]
    return names + [NOISY_MEAN] * any(c.noisy for c in results.conditions)


def _pivot(results: Results) -> Table:
    """Models by SNR: a row for each model and kind of noise."""
    noisy = [c for c in results.conditions if c.noisy]
    snrs = sorted({c.snr for c in noisy if c.snr is not None}, reverse=True)
    rows = []
    for kind in dict.fromkeys(c.kind for c in noisy):
        for model in results.models:
            wers = {c.snr: results.score(model, c.name).wer.value for c in noisy if c.kind == kind}
            cells = [_number(wers.get(snr, math.nan)) for snr in snrs]
            rows.append([kind, model, *cells, _number(sum(wers.values()) / len(wers))])
    return "WER in noise by SNR", ["noise", "model", *(f"{snr:g} dB" for snr in snrs), "mean"], rows


def _wer(results: Results, group: str = "all") -> Table:
    rows = [
        [condition, *(_interval(results.score(model, condition, group).wer) for model in results.models)]
        for condition in _spoken(results)
    ]
    return ("WER" if group == "all" else f"WER, {group.replace(':', ' ')}", ["condition", *results.models], rows)


def _errors(results: Results) -> Table:
    columns = ["model", "condition", "WER", "over speakers", "CER", "sub", "del", "ins", "empty", "loops"]
    rows = []
    for s in (results.score(model, condition) for model in results.models for condition in _spoken(results)):
        shares = [
            _number(100 * n / s.words if s.words else math.nan) for n in (s.substitutions, s.deletions, s.insertions)
        ]
        over_speakers = f"[{_number(s.wer_speakers.low)}, {_number(s.wer_speakers.high)}]"
        over_speakers = "-" if math.isnan(s.wer_speakers.low) else over_speakers
        counts = [str(s.empty), str(s.loops)]
        rows.append([s.model, s.condition, _number(s.wer.value), over_speakers, _number(s.cer), *shares, *counts])
    return "Errors (sub, del, ins in % of the words; empty and loops count utterances)", columns, rows


def _noise_only(results: Results) -> Table:
    columns = ["model", "hallucinated words per minute", "characters per minute", "utterances with words", "loops"]
    rows = []
    if any(c.kind == "noise-only" for c in results.conditions):
        for model in results.models:
            s = results.score(model, "noise-only")
            talking = sum(
                bool(x.text)
                for x in results.scored
                if (x.hypothesis.model, x.hypothesis.condition) == (model, s.condition)
            )
            rates = [_number(s.hallucinated), _number(s.hallucinated_characters)]
            rows.append([model, *rates, f"{talking} of {s.utterances}", str(s.loops)])
    return "Noise without speech", columns, rows


def _comparisons(results: Results) -> Table:
    columns = ["model", "condition", "resampled", "WER difference", "relative improvement", "p"]
    rows = []
    for c in results.comparisons:
        difference = Interval(*(100 * x for x in c.result.difference))
        relative = Interval(*(100 * x for x in c.result.relative))
        p = "-" if math.isnan(c.result.p_value) else f"{c.result.p_value:.4f}"
        rows.append([c.model, c.condition, c.units, _interval(difference, sign="+"), _interval(relative) + " %", p])
    baseline = next(iter(results.models), "")
    return f"Against {baseline} (paired bootstrap; below 0 and p < 0.05: better)", columns, rows


def _speed(results: Results) -> Table:
    columns = ["model", "condition", "latency mean", "median", "p95", "real-time factor"]
    rows = []
    for model in results.models:
        for c in results.conditions:
            s = results.score(model, c.name)
            times = [f"{s.latency[key]:.3f}" for key in ("mean", "median", "p95")]
            rows.append([model, c.name, *times, f"{s.rtf:.4f}"])
    size = results.options["batch_size"]
    return (
        f"Speed (seconds until the text of a batch of up to {size} is there; processing over audio time)",
        columns,
        rows,
    )


def _gates(summary: GateSummary) -> Table:
    layers = [str(i) for i in range(len(summary.pearson) - 1)]
    columns = ["condition", *(f"gate {i}" for i in layers), "gate", "primary on noise", "secondary on noise", "noise"]
    rows = []
    for name, means in summary.conditions.items():
        gate, primary, secondary = (over_layers(means[key]) for key in ("gate", "primary", "secondary"))
        each = [f"{x:.3f}" for x in means["gate"]]  # type: ignore[union-attr]
        shares = [f"{100 * x:.1f}" for x in (primary, secondary, over_layers(means["noise_frames"]))]
        rows.append([name, *each, f"{gate:.3f}", *shares])
    title = f"Gate of {summary.model} by layer, and attention on noise-dominated positions (% within the utterance)"
    return title + "; noise: share of such positions", columns, rows


def _correlations(summary: GateSummary) -> Table:
    columns = ["", *(f"gate {i}" for i in range(len(summary.pearson) - 1)), "gate"]
    both = {"pearson": summary.pearson, "spearman": summary.spearman}
    rows = [[name, *(_number(x, 3) for x in values)] for name, values in both.items()]
    return f"Correlation of SNR and the gate of {summary.model} (spearman: with clean speech)", columns, rows


def _number(x: float, digits: int = 1) -> str:
    return "-" if math.isnan(x) else f"{round(x, digits) + 0.0:.{digits}f}"  # no -0.0


def _interval(x: Interval, sign: str = "") -> str:
    if math.isnan(x.value):
        return "-"
    value, low, high = (f"{round(y, 1) + 0.0:{sign}.1f}" for y in x)
    return value if math.isnan(x.low) else f"{value} [{low}, {high}]"


def as_text(table: Table) -> str:
    title, columns, rows = table
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [columns, *rows]]
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(table: Table) -> str:
    title, columns, rows = table
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def as_latex(table: Table) -> str:
    """A tabular of the package booktabs, under its title as a comment."""
    title, columns, rows = table
    lines = [" & ".join("".join(TEX.get(c, c) for c in cell) for cell in line) + r" \\" for line in [columns, *rows]]
    begin = rf"\begin{{tabular}}{{{'l' * len(columns)}}}"
    return "\n".join(
        [f"% {title}", begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )


# ---- files --------------------------------------------------------------------------------------------------------


def all_values(results: Results) -> dict[str, Any]:
    """Everything, with every hypothesis; rates in percent, null for what is infinite or not a number."""
    return _plain(
        {
            "options": results.options,
            "models": results.models,
            "conditions": [asdict(c) | {"name": c.name} for c in results.conditions],
            "scores": [_score(s) for s in results.scores],
            "comparisons": [_comparison(c) for c in results.comparisons],
            "gates": [asdict(g) for g in results.gates],
            "hypotheses": [_hypothesis(s) for s in results.scored],
        }
    )


def as_csv(results: Results) -> str:
    """One line for each model, condition and group; the columns are those of the JSON's scores."""
    rows = [_plain(_score(s)) for s in results.scores]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _score(s: Score) -> dict[str, Any]:
    flat = {k: v for k, v in vars(s).items() if k not in ("wer", "wer_speakers", "latency")}
    intervals = {"wer": s.wer.value, "wer_low": s.wer.low, "wer_high": s.wer.high}
    intervals |= {"wer_speakers_low": s.wer_speakers.low, "wer_speakers_high": s.wer_speakers.high}
    return flat | intervals | {f"latency_{key}": value for key, value in s.latency.items()}


def _comparison(c: Paired) -> dict[str, Any]:
    names = {"baseline": c.baseline, "model": c.model, "condition": c.condition, "units": c.units}
    difference, relative = ([100 * x for x in interval] for interval in (c.result.difference, c.result.relative))
    values = {"difference": difference, "relative": relative}
    return names | values | {"p_value": c.result.p_value, "improvement": c.result.improvement}


def _hypothesis(s: Scored) -> dict[str, Any]:
    h, u = s.hypothesis, s.item.utterance
    return {
        "model": h.model,
        "condition": h.condition,
        "utterance": h.utterance,
        "source": s.item.source,
        "language": u.language,
        "speaker": u.speaker,
        "reference": u.text if h.condition != "noise-only" else "",
        "hypothesis": h.text,
        "normalized_reference": s.reference,
        "normalized_hypothesis": s.text,
        "words": s.words.reference,
        "substitutions": s.words.substitutions,
        "deletions": s.words.deletions,
        "insertions": s.words.insertions,
        "character_errors": s.characters.errors,
        "characters": s.characters.reference,
        "empty": s.empty,
        "loop": s.loop,
        "seconds": h.seconds,
        "latency": h.latency,
        "cost": h.cost,
        "gates": asdict(h.gates) if h.gates else None,
    }


def _plain(x: Any) -> Any:
    """What strict JSON can hold."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
