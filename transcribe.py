"""The shortest complete use of dawhisper: python transcribe.py audio.wav [model]"""

import sys

import dawhisper

model = dawhisper.load_model(*sys.argv[2:3])
segments, recording = dawhisper.transcribe_lazily(model, sys.argv[1])
for segment in segments:
    print(f"[{segment.start:7.2f} -> {segment.end:7.2f}]{segment.text}")
