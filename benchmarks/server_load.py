"""The server under load, on 127.0.0.1: concurrent clips, malformed requests, slow clients, a kill and a restart.

    python benchmarks/server_load.py tiny.en.pt MANIFEST --clips 64 --malformed 1000
    python benchmarks/server_load.py base.pt MANIFEST --batch_size 1 16 --repeat 2 --malformed 0
    python benchmarks/server_load.py base.pt MANIFEST --device cuda --batch_size 1 64 --malformed 0

Every clip is transcribed by its own request, all at once, and its text is compared to that of the clip alone
(`transcribe`); with each --batch_size, by a server started anew. The resident memory and open files of the last server
are read before and after the malformed requests.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

import dawhisper

PATH = "/v1/audio/transcriptions"


def start(model: str, device: str, clips: int, batch_size: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "dawhisper", "serve", "--model", model, "--port", "0", "--max_queue", str(clips)]
    command += ["--max_upload", "5", "--upload_timeout", "5", "--batch_size", str(batch_size), "--device", device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().split()[-1]


def post(url: str, clip: Path) -> httpx.Response:
    with clip.open("rb") as f:
        return httpx.post(url + PATH, files={"file": f}, data={"language": "en"}, timeout=600)


def alone(name: str, device: str, clips: list[Path]) -> list[str]:
    """The text of each clip by itself."""
    model = dawhisper.load_model(name, device=device, dtype="auto")  # as the server does
    began = time.perf_counter()
    texts = [model.transcribe(str(clip), language="en").text.strip() for clip in clips]
    print(f"{len(clips)} clips one after the other: {time.perf_counter() - began:.1f} s", flush=True)
    return texts


def all_at_once(url: str, clips: list[Path], expected: list[str]) -> str:
    """What became of a request for each clip, sent together."""
    began = time.perf_counter()

    def timed(clip: Path) -> tuple[httpx.Response, float]:
        return post(url, clip), time.perf_counter() - began

    with ThreadPoolExecutor(len(clips)) as pool:
        answers = list(pool.map(timed, clips))
    waits = [wait for _, wait in answers]
    good = sum(answer.is_success for answer, _ in answers)
    same = sum(a.is_success and a.json()["text"] == text for (a, _), text in zip(answers, expected))
    compared = f", {same} with the same text" if expected else ""
    middle, late = statistics.median(waits), statistics.quantiles(waits, n=20)[-1]
    return (
        f"{max(waits):.1f} s, {len(clips) / max(waits):.2f} answers a second, each after {middle:.1f} s in the median, "
        f"{late:.1f} s at 95%; {good} answered{compared}"
    )


def usage(pid: int) -> tuple[float, int]:
    """Resident MB and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    return resident / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def malformed(rng: random.Random, whole: bytes) -> tuple[bytes, dict[str, str]]:
    name = rng.choice(["a.wav", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "", "x" * 3000, "\u202e.wav"])
    content = rng.choice([b"", rng.randbytes(2000), whole[: rng.randrange(200)], b"#EXTM3U\nfile:///etc/passwd\n"])
    if rng.random() < 0.05:
        content = bytes(6_000_000)
    field = rng.choice(["file", "files", "model", "prompt"])
    part = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + content
    body = rng.choice(
        [part + b"\r\n--x--\r\n", part, part[: rng.randrange(len(part))], b"{}", b"", rng.randbytes(9000)]
    )
    kind = rng.choice(["multipart/form-data; boundary=x"] * 4 + ["multipart/form-data", "application/json", ""])
    return body, {"content-type": kind}


def begin(url: str) -> socket.socket:
    """A request whose body has only begun."""
    host, port = url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)))
    raw.sendall(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n")
    raw.sendall(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
    return raw


def drip(url: str) -> str:
    """Send a byte a second: the status of the answer after which the connection is closed, or what came else."""
    with begin(url) as raw:
        raw.settimeout(1)
        got = b""
        for _ in range(60):
            try:
                raw.send(b"x")
                data = raw.recv(65536)
                got += data
                if not data:
                    return got[9:12].decode() or "closed"
            except TimeoutError:
                continue
            except ConnectionError:
                return got[9:12].decode() or "closed"
    return "kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--device", default="cpu", help="of the server and of the clips alone")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--repeat", type=int, default=1, help="times that each batch size is measured")
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--only_time", action="store_true", help="don't compare texts with each clip's alone")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.manifest.read_text().splitlines()[: min(args.clips, 256)]]
    clips = [args.manifest.parent / line["audio"] for line in lines]
    expected = [] if args.only_time else alone(args.model, args.device, clips)
    measured = [size for size in args.batch_size for _ in range(args.repeat)]
    for i, batch_size in enumerate(measured):
        process, url = start(args.model, args.device, len(clips), batch_size)
        try:
            print(f"at once, --batch_size {batch_size}: {all_at_once(url, clips, expected)}", flush=True)
            if args.malformed and i == len(measured) - 1:
                mistreat(process, url, clips[0], args.malformed)
        finally:
            process.terminate()
            process.wait(60)
    if args.malformed:
        process, url = start(args.model, args.device, len(clips), measured[-1])
        try:
            again = post(url, clips[0])
            same = f", the text as before: {again.json()['text'] == expected[0]}" if expected else ""
            print(f"started again: {again.status_code}{same}")
        finally:
            process.terminate()
            process.wait(60)


def mistreat(process: subprocess.Popen[str], url: str, clip: Path, malformed_requests: int) -> None:
    """Malformed requests, slow clients, and a kill in the middle of work."""
    rng, whole = random.Random(0), clip.read_bytes()
    statuses: dict[int, int] = {}
    before = usage(process.pid)
    slow = ThreadPoolExecutor(16)
    dripped = [slow.submit(drip, url) for _ in range(16)]
    with httpx.Client(base_url=url, timeout=60) as client:
        for i in range(malformed_requests):
            if i % 20 == 0:
                begin(url).close()
            body, headers = malformed(rng, whole)
            status = client.post(PATH, content=body, headers=headers).status_code
            statuses[status] = statuses.get(status, 0) + 1
    slow_statuses = sorted({future.result() for future in dripped})
    time.sleep(1)
    after = usage(process.pid)
    print(f"{malformed_requests} malformed requests: statuses {statuses}; slow clients: {slow_statuses}")
    print(f"memory {before[0]:.0f} -> {after[0]:.0f} MB, open files {before[1]} -> {after[1]}")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, url, clip)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        print(f"killed during work: the client gets {type(running.exception(60)).__name__}")


if __name__ == "__main__":
    main()
