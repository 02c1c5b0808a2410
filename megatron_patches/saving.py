"""Checkpoints: what megatron.core.dist_checkpointing leaves running."""

from __future__ import annotations

import queue
import threading
from typing import Any

from megatron_patches.registry import patch, replace, require

_FILESYSTEM = "megatron/core/dist_checkpointing/strategies/filesystem_async.py"


@patch(
    upstream=f"{_FILESYSTEM}:get_write_results_queue (before 0.18 with a leading underscore)",
    checked="megatron-core 0.16.1 and 0.18.2",
    until="a synchronous save starts no manager process",
    without_cuda=False,
)
def results_queue_in_process() -> None:
    """A save passes its writers' results through the queue of a multiprocessing Manager, which
    each rank starts once. That costs 1 to 2 s and 200 MB a rank, it imports the main module again,
    and the manager outlives a rank that is killed. A queue of another process is needed where an
    asynchronous save runs in another process. A synchronous save puts and gets in one process, so
    a plain queue is enough. An asynchronous save would fail loudly, because it finds no results."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    # The name and the arguments changed with 0.18.
    old = hasattr(filesystem, "_get_write_results_queue")
    name = "_get_write_results_queue" if old else "get_write_results_queue"
    parameters = () if old else ("mp_mode",)
    require(filesystem, name, parameters=parameters, source="ctx.Manager().Queue()")
    # One queue for all saves, as upstream has one manager.
    results: queue.Queue[Any] = queue.Queue()

    def results_queue(mp_mode: str = "spawn") -> queue.Queue[Any]:
        return results

    replace(filesystem, name, results_queue)


@patch(
    upstream=f"{_FILESYSTEM}:FileSystemWriterAsync.write_preloaded_data_multiproc",
    checked="megatron-core 0.16.1",
    until="0.16.1 is no longer supported: later versions write with threads",
    without_cuda=False,
    below="0.18",
)
def writers_are_threads() -> None:
    """A save forks a process for each of its files. A rank that is killed meanwhile leaves them
    behind for ever: each waits for a queue that nobody empties and holds the rank's memory. A fork
    also copies locks that other threads (gloo's, a heartbeat) may hold. Threads of the rank write
    the same files: most of their time is I/O and copying, outside the interpreter's lock."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    writer = filesystem.FileSystemWriterAsync
    require(
        writer,
        "write_preloaded_data_multiproc",
        parameters=("transform_list", "use_msc", "rank", "write_buckets", "global_results_queue"),
        source='mp.get_context("fork")',
    )
    # The function that writes one file. It stays upstream's own.
    write = require(
        writer,
        "write_preloaded_data",
        parameters=(
            "transform_list",
            "local_proc_idx",
            "write_bucket",
            "results_queue",
            "count_queue",
            "use_fsync",
        ),
        source="results_queue.put(local_output)",
    )

    def write_preloaded_data_multiproc(
        transform_list: Any, use_msc: bool, rank: int, write_buckets: Any, global_results_queue: Any
    ) -> None:
        results: queue.Queue[Any] = queue.Queue()
        # Each writer takes one entry out of this queue at its end, so there must be as many.
        running: queue.Queue[int] = queue.Queue()
        threads = []
        for number, bucket in enumerate(write_buckets):
            running.put(number)
            # True: each file is forced to disk before the checkpoint counts as written.
            arguments = (transform_list, number, bucket, results, running, True)
            thread = threading.Thread(target=write, args=arguments, kwargs={"use_msc": use_msc})
            threads.append(thread)
            thread.start()
        # All writers end before the caller continues, as with the processes of upstream.
        for thread in threads:
            thread.join()
        outcomes = dict(results.get() for _ in threads)
        # A writer puts its error instead of its result. The caller raises an error that it gets.
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
        global_results_queue.put(failed[0] if failed else outcomes)

    replace(writer, "write_preloaded_data_multiproc", staticmethod(write_preloaded_data_multiproc))
