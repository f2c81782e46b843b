"""Recordings shared out among processes: each once; where one dies, only the recording it dies with is lost."""

from __future__ import annotations

import pytest
from helpers.dying import Dying

from dawhisper.bulk.devices import share
from dawhisper.bulk.inputs import Input
from dawhisper.errors import OptionError


def test_a_process_that_dies_loses_its_recording_alone() -> None:
    inputs = [Input(name, name) for name in ("a", "b", "bad", "c", "d", "e", "f")]
    with pytest.warns(UserWarning, match="none is left out: device none: there is none"):
        outcomes = list(share(Dying(), ["cpu", "none"], inputs, readers=4))
    assert sorted(outcome.item.output for outcome in outcomes) == sorted(item.output for item in inputs)
    (lost,) = (outcome for outcome in outcomes if outcome.error)
    assert lost.item.output == "bad"
    assert lost.error.startswith("bad: the process that transcribed it died by signal 9")
    with pytest.warns(UserWarning), pytest.raises(OptionError, match="device none: there is none"):
        list(share(Dying(), ["none"], inputs, readers=4))
