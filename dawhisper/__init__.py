"""dawhisper: Whisper with a second cross-attention for noise.

>>> import dawhisper
>>> model = dawhisper.load_model()  # or "base", "small" ...: OpenAI's
>>> print(model.transcribe("audio.wav").text)
"""

from whisper.tokenizer import LANGUAGES

from dawhisper.formats.dawhisper import save_model

from .audio import load_audio, log_mel_spectrogram, pad_or_trim
from .checkpoint import available_models, load_model, set_alignment_heads
from .decoding import DecodingOptions, DecodingResult, decode, detect_language
from .errors import DawhisperError
from .fast.compile import compile_blocks
from .model import AudioFeatures, DualOptions, ModelDimensions, Whisper
from .timing import Word
from .trace import Trace
from .transcribe import transcribe, transcribe_lazily
from .transcription import Segment, Transcription

__version__ = "0.1.0"

# openai-whisper's methods; the model's own file knows nothing of the rest of the package
Whisper.compile_blocks = compile_blocks  # type: ignore[attr-defined]
Whisper.set_alignment_heads = set_alignment_heads  # type: ignore[attr-defined]
Whisper.transcribe = transcribe  # type: ignore[attr-defined]
Whisper.decode = decode  # type: ignore[attr-defined]
Whisper.detect_language = detect_language  # type: ignore[attr-defined]

__all__ = [
    "LANGUAGES",
    "AudioFeatures",
    "DawhisperError",
    "DecodingOptions",
    "DecodingResult",
    "DualOptions",
    "ModelDimensions",
    "Segment",
    "Trace",
    "Transcription",
    "Whisper",
    "Word",
    "available_models",
    "decode",
    "detect_language",
    "load_audio",
    "load_model",
    "log_mel_spectrogram",
    "pad_or_trim",
    "save_model",
    "transcribe",
    "transcribe_lazily",
]
