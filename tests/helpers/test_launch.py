import os
import signal

from helpers import launch as processes
from helpers.launch import launch
from tqdm import tqdm


def main():
    for _ in tqdm(range(2)):
        pass


def killed_while_drawing(rank):
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_it_draws_a_bar_does_not_block_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LONGEST", 30)
    main()  # creates tqdm's lock in the test process, whose forks inherit it
    assert launch(main, [], tmp_path, prepare=killed_while_drawing) == {0: -signal.SIGKILL}
    assert launch(main, [], tmp_path) == {0: 0}
