"""The options of `dawhisper serve`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from dawhisper.checkpoint import OWN_MODEL
from dawhisper.device import DEVICE_HELP, DTYPE_HELP, DTYPE_NAMES, THREADS_HELP
from dawhisper.errors import OptionError
from dawhisper.options import option


@dataclass(frozen=True)
class ServerOptions:
    """models: names or paths, or NAME=PATH; the first one is also "whisper-1". Sizes in MB, times in seconds.

    max_queue: requests that are waiting or running; more get 429. max_upload: of a request's body; max_audio: of a
    recording. upload_timeout: until a request's body has come; later ones get 408. idle_timeout: that a client may
    send or read nothing of what is awaited. timeout: of a request, from its first byte to its answer. api_key: what
    clients must send; None for all. diarize: offer response_format=diarized_json, see dawhisper/speakers.py.
    """

    models: tuple[str, ...] = option(
        (OWN_MODEL,), f"name, path or NAME=PATH, once a model; {OWN_MODEL} by default", name="model", append=True
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all, which needs --api_key to be safe")
    port: int = option(8000, "0 takes a free one")
    device: str | None = option(None, DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPE_NAMES)
    threads: int = option(0, THREADS_HELP)
    api_key: str | None = option(
        None, "what clients must send; $DAWHISPER_API_KEY by default, which other users can't see"
    )
    batch_size: int = option(8, "short clips of different requests decoded together")
    max_queue: int = option(64, "requests waiting or running; more are refused with 429")
    max_live: int = option(4, "live streams at once")
    max_upload: float = option(100.0, "MB of a request; more is refused with 413")
    max_audio: float = option(7200.0, "seconds of a recording")
    upload_timeout: float = option(300.0, "seconds for an upload to come; slower ones get 408")
    idle_timeout: float = option(20.0, "seconds that a client may send nothing of what is awaited; then it is let go")
    timeout: float = option(600.0, "seconds of a request")
    allow_origin: tuple[str, ...] = option(
        (), "a web page's origin that may use the server, as https://app.example, or * for all", append=True
    )
    alias: tuple[str, ...] = option((), "NAME=MODEL: another name of a model, once a name", append=True)
    diarize: bool = option(False, "offer diarized_json, which tells who speaks, by pyannote.audio", flag=True)
    hf_token: str | None = option(None, "the token that pyannote's weights are given for; HF_TOKEN by default")

    def __post_init__(self) -> None:
        sizes = ("batch_size", "max_queue", "max_live", "max_upload", "max_audio")
        for name in (*sizes, "upload_timeout", "idle_timeout", "timeout"):
            if not getattr(self, name) > 0:
                raise OptionError(f"--{name} is above 0, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"--port lies between 0 and 65535, not {self.port}")
        for origin in self.allow_origin:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise OptionError(f"--allow_origin is SCHEME://HOST[:PORT] without a path, or *, not {origin!r}")
        for alias in self.alias:
            if not all(alias.partition("=")):
                raise OptionError(f"--alias is NAME=MODEL, not {alias!r}")

    def names(self, models: Iterable[str]) -> dict[str, str]:
        """Which model each alias means; OptionError where there is no such model."""
        known = list(models)
        names = {"whisper-1": known[0]}
        for alias in self.alias:
            name, _, model = alias.partition("=")
            if model not in known:
                raise OptionError(f"--alias {alias}: there is no model {model!r}, only {', '.join(known)}")
            names[name] = model
        return {name: model for name, model in names.items() if name not in known}
