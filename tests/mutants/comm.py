# SPDX-License-Identifier: Apache-2.0
"""Faults in csrc/comm, each of which csrc/checks/comm.cpp must notice: by saying so, or by not ending.

python tests/mutants/comm.py [PART OF A NAME ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
LOCK = "  std::lock_guard<std::mutex> lock(mutex_);\n"

# what, the text as it is (it stands once), the text as it should not be
FAULTS: list[tuple[str, str, str]] = [
    ("the rows to send are not waited for",
     'cuda(api_.stream_wait(stream_, work->ready_, 0), "cudaStreamWaitEvent");', ""),
    ("the end is an event of another stream", "event_record(work->finished_, stream_)",
     "event_record(work->finished_, stream)"),
    ("join waits for the beginning", "stream_wait(stream, finished_, 0)", "stream_wait(stream, ready_, 0)"),
    ("a rank's own rows stay where they were", "if (send_bytes[self] > 0)", "if (false)"),
    ("own rows from another place", "send + from[self]", "send"),
    ("the rows of another rank are sent", "send + from[size_t(next)]", "send + from[size_t(last)]"),
    ("rows arrive in another's place", "receive + to[size_t(last)]", "receive + to[size_t(next)]"),
    ("as many as the wrong rank sends", "n = receive_bytes[size_t(last)]", "n = receive_bytes[size_t(next)]"),
    ("peers rotated the wrong way", "last = (rank_ - step + world_) % world_", "last = (rank_ + step) % world_"),
    ("the last peer is left out", "step < world_; ++step", "step < world_ - 1; ++step"),
    ("goes on before NCCL has taken the group", '  settle("all_to_all");\n', ""),
    ("the group is not ended", "keep(api_.group_end());", ""),
    ("connecting knows no deadline", "if (Clock::now() > deadline) fail(std::string(what)",
     "if (false) fail(std::string(what)"),
    ("waiting knows no deadline", "if (Clock::now() > deadline) {", "if (false) {"),
    ("an abort is waited for", "end.wait_for(std::chrono::duration<double>(seconds_)) != std::future_status::ready",
     "(end.wait(), false)"),
    ("a failed communicator is used", "if (!why_.empty()) throw", "if (false) throw"),
    ("why it failed is forgotten", "  why_ = what;\n", ""),
    ("a failure does not abort", "  why_ = what;\n  abort_locked();", "  why_ = what;"),
    ("errors are not asked for while waiting",
     'int state = kSuccess;\n  nccl(api_.async_error(comm_, &state), "ncclCommGetAsyncError");\n'
     "  nccl(state, what);\n  const int", "const int"),
    ("negative sizes pass", "n < 0 || ", ""),
    ("sizes overflow", "int64_t(begin.back()) > INT64_MAX - n", "false"),
    ("too few sizes pass", "if (bytes.size() != size_t(world_))", "if (false)"),
    ("a rank sends itself what it does not take", "if (send_bytes[size_t(rank_)] != receive_bytes[size_t(rank_)])",
     "if (false)"),
    ("threads at once", f'same_process("all_to_all");\n{LOCK}', 'same_process("all_to_all");\n'),
    ("a communicator stays behind", "  abort_locked();\n  if (stream_ != nullptr) api_",
     "  if (stream_ != nullptr) api_"),
    ("a stream stays behind", "if (stream_ != nullptr) api_.stream_destroy(stream_);", ""),
    ("an event stays behind", "if (finished_ != nullptr) api_.event_destroy(finished_);", ""),
    ("a child uses its parent's", "if (getpid() != pid_)\n    throw", "if (false)\n    throw"),
    ("a later timeout is not taken", "  seconds_ = seconds;\n}", "}"),
    ("any device will do", 'cuda(api_.set_device(device_), "cudaSetDevice");\n  cuda(api_.stream_create',
     "cuda(api_.stream_create"),
    ("aborted and used", 'if (why_.empty()) why_ = "aborted";', ""),
    ("closed and used", '  why_ = "it was closed";\n', ""),
    ("closing does not wait for the others", '  settle("closing");\n', ""),
]  # fmt: skip

# what is not noticed, and why that is right
HARMLESS = {
    "negative sizes pass": "the check after it refuses them, by an overflow that UndefinedBehaviorSanitizer reports",
    "peers rotated the wrong way": "the calls of a group may stand in any order: only which peer is first changes",
    "closing does not wait for the others": "a rank that is gone early harms nobody once all exchanges have"
    " ended; with NCCL itself destroying waits as well",
}


def build(folder: Path, *words: str) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, "-O1", "-pthread", f"-I{ROOT / 'csrc'}", *words], check=True, cwd=folder)


def noticed(folder: Path) -> bool:
    try:
        done = subprocess.run(
            [folder / "checks", folder / "libstandin.so"], capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main(parts: list[str]) -> int:
    source, bad = (ROOT / "csrc/comm/communicator.cpp").read_text(), []
    chosen = [fault for fault in FAULTS if not parts or any(part in fault[0] for part in parts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(
            folder,
            "-std=c++17",
            "-shared",
            "-fPIC",
            str(ROOT / "tests/nccl_standin.cpp"),
            "-o",
            "libstandin.so",
            "-lrt",
        )
        build(folder, "-std=c++20", "-c", str(ROOT / "csrc/checks/comm.cpp"), "-o", "main.o")
        build(folder, "-std=c++20", "-c", str(ROOT / "csrc/comm/nccl_api.cpp"), "-o", "api.o")
        for what, old, new in [("nothing", "", ""), *chosen]:
            if old and source.count(old) != 1:
                bad.append(f"{what}: the text stands {source.count(old)} times in communicator.cpp")
                continue
            (folder / "communicator.cpp").write_text(source.replace(old, new) if old else source)
            build(
                folder,
                "-std=c++20",
                f"-I{ROOT / 'csrc/comm'}",
                "communicator.cpp",
                "main.o",
                "api.o",
                "-o",
                "checks",
                "-ldl",
            )
            found = noticed(folder)
            expected = bool(old) and what not in HARMLESS
            print(f"{'noticed' if found else 'passed':<8} {what}", flush=True)
            if found != expected:
                bad.append(f"{what}: {'noticed' if found else 'not noticed'}")
    print(f"{len(chosen)} faults, {len(bad)} of them not as they should be")
    for line in bad:
        print(f"    {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
