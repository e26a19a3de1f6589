"""Hosts that are lost, slow and back again: an elastic run over network namespaces of this machine. Needs root.

python -m scripts.chaos.hosts --config CONFIG.yaml --out runs/hosts

Each host is a namespace with an agent of torchrun and one rank, all joined by a bridge. The last host is cut off in the
middle, later slowed down and joined again. What is to be seen: the others go on by themselves from the last checkpoint,
the host that is back joins at the next restart, and every step of the run is in metrics.jsonl exactly once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BRIDGE, NET = "mmbr0", "10.77.13"
# With the store that agents share by default, torch 2.13 gives a host that joins later no address of the others.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
SLOW = "MINIMOE_FAILPOINTS=train.step=sleep:0.3"  # so that a host can be back before the end
_PATIENCE = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120"


class Host:
    """A network namespace, and the agent in it."""

    def __init__(self, number: int, words: list[str], hosts: int, out: Path) -> None:
        self.name, self.link = f"mmhost{number}", f"mmveth{number}"
        self._command = [
            *("ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", f"1:{hosts}", "--nproc_per_node", "1", "--max-restarts", "20", "--rdzv_id", "minimoe"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{NET}.1:29477", "--monitor_interval", "0.5"),
            *("--rdzv_conf", f"{_PATIENCE},is_host={str(number == 0).lower()}"),
            *("--local_addr", f"{NET}.{number + 1}", "-m", "minimoe.cli", *words),
        ]
        self._log = out / f"{self.name}.log"
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "link", "set", self.link, "master", BRIDGE, "up")
        for words in (
            ["addr", "add", f"{NET}.{number + 1}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            run("ip", "-n", self.name, *words)
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Its agent, with GLOO told which link to use."""
        with self._log.open("ab") as log:
            command = ["env", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1", SLOW, OWN_STORE, *self._command]
            self.agent = subprocess.Popen(command, stdout=log, stderr=log)

    def cut(self) -> None:
        """No packet gets in or out any more."""
        run("ip", "link", "set", self.link, "down")

    def slow_down(self, megabits: int, delay_ms: int) -> str:
        """What it sends: so many megabits a second, and where the kernel can, each packet late; returns what was done.

        A link that is full delays packets anyway, by up to the 400 ms that they may wait in its queue.
        """
        inside = ["ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", "eth0"]
        late = [*inside, "root", "netem", "delay", f"{delay_ms}ms", "rate", f"{megabits}mbit"]
        if not subprocess.run(late, check=False, capture_output=True).returncode:
            return f"{megabits} Mbit/s and each packet {delay_ms} ms late"
        run(*inside, "root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms")
        return f"{megabits} Mbit/s"

    def stop(self) -> None:
        """End its agent and what that has started."""
        if self.agent is not None and self.agent.poll() is None:
            self.agent.terminate()
            try:
                self.agent.wait(15)
            except subprocess.TimeoutExpired:
                self.agent.kill()
                self.agent.wait()
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for process in found.stdout.split():
            subprocess.run(["kill", "-9", process], check=False)

    def remove(self) -> None:
        self.stop()
        subprocess.run(["ip", "link", "del", self.link], check=False)
        subprocess.run(["ip", "netns", "del", self.name], check=False)


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def steps_done(metrics: Path) -> int:
    """Of the run, as far as it is logged."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return max((row["step"] for row in rows if "loss" in row), default=0)


def median_seconds(metrics: Path, first: int, last: int) -> float:
    """Of a step, from one to another."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = {row["step"]: row["seconds"] for row in rows if "loss" in row}
    return statistics.median(seconds[step] - seconds[step - 1] for step in range(first, last) if step - 1 in seconds)


def wait_for(metrics: Path, step: int, seconds: float, agent: Host) -> float:
    """Until the run has come so far; returns the seconds it took."""
    started = time.monotonic()
    while steps_done(metrics) < step:
        if time.monotonic() - started > seconds:
            raise SystemExit(f"step {step} not reached in {seconds:.0f} s; at {steps_done(metrics)}")
        if agent.agent is not None and agent.agent.poll() is not None and steps_done(metrics) < step:
            raise SystemExit(f"the first host ended with {agent.agent.returncode}")
        time.sleep(0.2)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/pretrain.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/hosts"))
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--megabits", type=int, default=100, help="a second, that the host sends which was lost")
    parser.add_argument("overrides", nargs="*", help="of the config, e.g. train.batch_size=6")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out / "run"
    words = ["pretrain", options.config, f"output_dir={folder}", f"train.max_steps={options.steps}"]
    words += ["parallel.timeout_seconds=10", "train.save_every=5", "train.log_every=1", "train.eval_every=1000"]
    words += ["train.sample_every=null", "logging.report=false", *options.overrides, "--resume"]
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "link", "set", BRIDGE, "up")
    hosts: list[Host] = []
    try:
        hosts += [Host(number, words, options.hosts, options.out) for number in range(options.hosts)]
        for host in hosts:
            host.start()
        metrics, last = folder / "metrics.jsonl", hosts[-1]
        wait_for(metrics, 20, 300, hosts[0])
        last.cut()
        lost_at = steps_done(metrics)
        seconds = wait_for(metrics, lost_at + 3, 180, hosts[0])
        print(f"one of {options.hosts} hosts cut off after step {lost_at}: the others went on after {seconds:.0f} s")
        last.remove()  # with all that it had not sent yet, as a host that is switched off
        last = hosts[-1] = Host(options.hosts - 1, words, options.hosts, options.out)
        slowed = last.slow_down(options.megabits, delay_ms=5)
        last.start()
        back_at = steps_done(metrics)
        wait_for(metrics, options.steps, 600, hosts[0])
        worlds = [line for line in (options.out / "mmhost0.log").read_text(errors="replace").splitlines()
                  if "process(es)" in line]  # fmt: skip
        before, after = (
            median_seconds(metrics, *steps) for steps in ((5, lost_at), (options.steps - 20, options.steps))
        )
        print(f"a step took {before:.2f} s on fast links, {after:.2f} s with the slow one")
        print(f"back after step {back_at}, with a link of {slowed}; what the run was, one after the other:")
        for line in worlds:
            print("  " + line.strip())
        for host in hosts:
            if host.agent is not None:
                host.agent.wait(120)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == list(range(1, options.steps + 1)), "a step is missing, or there twice"
        assert (folder / "final" / "model.safetensors").exists()
        hashes = {row["step"]: row["batch_hash"] for row in rows if "loss" in row}
        print(f"all {options.steps} steps are there once; {len(set(hashes.values()))} different batches of rank 0")
    finally:
        for host in hosts:
            host.remove()
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


if __name__ == "__main__":
    main()
