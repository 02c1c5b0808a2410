"""A server as a user starts it who knows nothing of lopd: the process of
sglang_rollout.servers.launch without what keeps log-probabilities at temperature 1.
"""

from __future__ import annotations

if __name__ in ("__main__", "__mp_main__"):
    from sglang_rollout.cpu.settings import on_cpu

    if on_cpu():
        from sglang_rollout.cpu import stand_ins

        stand_ins.install()

if __name__ == "__main__":
    from sglang_rollout.servers import launch

    launch._check_original_logprobs = lambda: None  # which ends such a server
    launch.main()
