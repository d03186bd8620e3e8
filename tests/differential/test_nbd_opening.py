"""A server whose image takes long to open: clients wait for it, and it can be ended."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.cli.serving import Serving
from tests.differential.nbd_servers import SECONDS
from tests.differential.programs import ended, environment

pytestmark = pytest.mark.peer

TOOL = str(Path(sys.executable).parent / "diskwright")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("words", [("-t", "-k", "s", "-f", "raw"), ("serve", "-q", "-k", "s")],
                         ids=["nbd", "serve"])  # fmt: skip
def test_signals_end_it_while_it_opens(nbd, tmp_path, words, number):
    """An image that takes long: clients wait for it, and nothing is left of it."""
    words = [str(tmp_path / word) if word == "s" else word for word in words]
    argv = nbd.argv(*words) if words[0] == "-t" else [TOOL, *words]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        silent.settimeout(SECONDS)
        process = subprocess.Popen(
            [*argv, "nbd+unix:///?socket=silent"], cwd=tmp_path, env=environment()
        )
        with ended(process):
            asked, _ = silent.accept()  # it waits for an answer now
            with asked, socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "s"))
                process.send_signal(number)
                assert process.wait(SECONDS) == 0
    assert not (tmp_path / "s").exists()


def test_a_second_signal_does_not_wait_for_the_image(nbd, tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        silent.settimeout(SECONDS)
        words = ("-t", "-k", str(tmp_path / "s"), "-f", "raw", "nbd+unix:///?socket=silent")
        process = subprocess.Popen(nbd.argv(*words), cwd=tmp_path, env=environment())
        with ended(process):
            asked, _ = silent.accept()
            with asked:
                process.send_signal(signal.SIGINT)  # it looks once a second whether to go on
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                assert process.wait(SECONDS) == -signal.SIGINT
    assert not (tmp_path / "s").exists()


def test_a_signal_between_the_image_and_the_server(tmp_path, monkeypatch):
    """It has its sockets then, and waits for nobody; nothing of it is left."""
    diskwright.create(tmp_path / "disk", "1M", format="qcow2")
    run = Serving.run

    def ended_before(serving: Serving) -> None:
        signal.raise_signal(signal.SIGTERM)
        run(serving)

    monkeypatch.setattr(Serving, "run", ended_before)
    handlers = {
        name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    before = sorted(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        assert main(["serve", "-q", "-k", str(tmp_path / "s"), str(tmp_path / "disk")]) == 0
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert not (tmp_path / "s").exists()


def test_one_image_under_two_names(tmp_path):
    """Nobody is told to end the server that cannot begin."""
    diskwright.create(tmp_path / "disk", "1M", format="qcow2")
    words = [TOOL, "serve", "-k", str(tmp_path / "s"), "x=disk", "y=disk"]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 1
    assert "this process itself uses 'disk'" in done.stderr
    assert "It is in use by" not in done.stderr
    assert not (tmp_path / "s").exists()
