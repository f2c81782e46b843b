"""Terms that decoding is to favour: a prefix tree over their tokens, whose paths raise log probabilities.

Shallow fusion with a list of terms, as in Williams et al. 2018 ("Contextual Speech Recognition in End-to-End Neural
Network Systems using Beam Search"): each token that starts a term or goes on with one gains `strength`, and what an
unfinished term has gained is taken back where it breaks off. The tree lies in tensors on the model's device, and all
rows of a batch move through it at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tiktoken import Encoding
from torch import Tensor

from .errors import OptionError, one_line


def terms_of(hotwords: str | Sequence[str] | None) -> tuple[str, ...]:
    """Terms, of which a string has several between commas or on lines; each once, none empty."""
    if hotwords is None:
        return ()
    lines = hotwords.replace(",", "\n").splitlines() if isinstance(hotwords, str) else hotwords
    return tuple(dict.fromkeys(term.strip() for term in lines if term.strip()))


def read_terms(hotwords: str | None) -> tuple[str, ...]:
    """The terms that the command line names: those in a UTF-8 file, where there is one of that name."""
    path = Path(hotwords or "")
    try:
        return terms_of(path.read_text("utf-8-sig") if path.is_file() else hotwords)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"can't read the hotwords in {path}: {one_line(error)}; it is to be text in UTF-8") from error


@dataclass(frozen=True)
class PrefixTree:
    """N nodes, of which 0 is the root, with up to C children each; a path's gain is counted in tokens.

    start [V]: the node that each token leads to from the root, 0 where it starts no term; first: those that do start
    one. tokens, nodes [N, C]: of the children of each node but the root, padded with 0. gain [N, C]: what such a token
    is worth more than any other. owed [N]: what leaving the node costs, the gain since the last whole term.
    """

    start: Tensor
    first: Tensor
    tokens: Tensor
    nodes: Tensor
    gain: Tensor
    owed: Tensor

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]], n_vocab: int, device: torch.device) -> PrefixTree:
        """The tree of token sequences."""
        children: list[dict[int, int]] = [{}]  # of each node: token -> node
        owed = [0]
        whole = {tuple(sequence) for sequence in sequences if sequence}
        for sequence in sorted(
            whole, key=lambda s: (len(s), s)
        ):  # shorter ones first: they settle what longer ones owe
            node = 0
            for i, token in enumerate(sequence):
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    owed.append(owed[node] + 1)
                node = children[node][token]
                if sequence[: i + 1] in whole:
                    owed[node] = 0
        width = max([len(each) for each in children[1:]], default=0) or 1
        start = torch.zeros(n_vocab, dtype=torch.long)
        tokens, nodes = torch.zeros(2, len(children), width, dtype=torch.long)
        gain = torch.zeros(len(children), width)
        for token, node in children[0].items():
            start[token] = node
        for node, each in enumerate(children[1:], 1):
            for place, (token, child) in enumerate(each.items()):
                tokens[node, place], nodes[node, place] = token, child
                gain[node, place] = owed[node] + (token not in children[0])  # a first token gains 1 wherever it stands
        made = (start, start.nonzero()[:, 0], tokens, nodes, gain, torch.tensor(owed, dtype=torch.float))
        return cls(*(x.to(device) for x in made))


@lru_cache(maxsize=16)
def prefix_tree(terms: tuple[str, ...], encoding: Encoding, n_vocab: int, device: torch.device) -> PrefixTree:
    """The tree of terms as they are written, at the beginning of a text and behind a space."""
    spelled = [space + term for term in terms for space in ("", " ")]
    return PrefixTree.of([encoding.encode(term, disallowed_special=()) for term in spelled], n_vocab, device)


class Hotwords:
    """Where each of the rows stands in the tree: all at its root at first."""

    def __init__(self, tree: PrefixTree, strength: float, rows: int):
        self.tree, self.strength = tree, strength
        self.node = torch.zeros(rows, dtype=torch.long, device=tree.owed.device)

    def raised(self, logprobs: Tensor) -> Tensor:
        """Log probabilities [R, V], or logits, of the next tokens, with what each gains or loses for its row."""
        tree, made = self.tree, logprobs.float() - self.strength * self.tree.owed[self.node][:, None]
        made[:, tree.first] += self.strength
        return made.scatter_add_(1, tree.tokens[self.node], self.strength * tree.gain[self.node])

    def follow(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Go on with the chosen tokens [R]; row i continues what was rows[i]."""
        node = self.node if rows is None else self.node[rows]
        nodes = self.tree.nodes[node]
        on = torch.where(self.tree.tokens[node] == chosen[:, None], nodes, 0).sum(dim=1)
        self.node = torch.where(on > 0, on, self.tree.start[chosen])

    def keep(self, rows: Tensor) -> None:
        self.node = self.node[rows]
