"""The thread controller against simulated machines."""

from edge.backends.llamacpp_threads import ThreadController


class Machine:
    """Steps of 10 ms at `most` threads; while disturbed each barrier waits for the busy core."""

    def __init__(self, most: int) -> None:
        self.controller = ThreadController(most)
        self.most = most
        self.busy = 0
        self.now = 0.0

    def step(self) -> float:
        threads = self.controller.threads
        seconds = 0.010 * self.most / threads
        if threads + self.busy > self.most:
            seconds *= 8
        self.now += seconds
        self.controller.learn(1, seconds, self.now)
        return seconds

    def run(self, steps: int) -> float:
        """The mean seconds of the last half."""
        taken = [self.step() for _ in range(steps)]
        return sum(taken[steps // 2 :]) / (steps - steps // 2)


def test_a_quiet_machine_keeps_all_threads() -> None:
    machine = Machine(2)
    assert {machine.controller.threads for _ in range(300) if machine.step()} == {2}


def test_a_busy_core_costs_a_thread_and_no_more() -> None:
    machine = Machine(2)
    machine.run(50)
    machine.busy = 1
    assert machine.run(400) < 0.024
    assert machine.controller.threads == 1
    machine.busy = 0
    machine.run(800)
    assert machine.controller.threads == 2


def test_more_cores_go_down_step_by_step() -> None:
    machine = Machine(8)
    machine.run(50)
    machine.busy = 3
    machine.run(200)
    assert machine.controller.threads == 4
    machine.busy = 0
    machine.run(2000)
    assert machine.controller.threads == 8


def test_slow_steps_that_fewer_threads_do_not_mend_leave_all_of_them() -> None:
    controller = ThreadController(4)
    for i in range(50):
        controller.learn(1, 0.01, i * 0.01)
    used = []
    for i in range(1000):
        now = 1.0 + i * 0.05
        # Everything is slower (a battery, heat), and fewer threads are slower still.
        controller.learn(1, 0.05 * 4 / controller.threads, now)
        used.append(controller.threads)
    assert used.count(4) > 0.8 * len(used)


def test_a_growing_context_is_no_disturbance() -> None:
    controller = ThreadController(2)
    used = set()
    for i in range(3000):
        controller.learn(1, 0.01 * (1 + i / 600), i * 0.02)
        used.add(controller.threads)
    assert used == {2}


def test_one_thread_has_nothing_to_give() -> None:
    controller = ThreadController(1)
    for i in range(100):
        controller.learn(1, 0.01 if i < 50 else 1.0, float(i))
    assert controller.threads == 1
