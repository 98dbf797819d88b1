"""An engine whose scores are a formula: searches can be tested in a moment, and killed in a slow one."""

import hashlib
import time

from attnreuse import Policy
from attnreuse.study.evaluate import Calls
from attnreuse.study.setting import Setting


class FakeEvaluator:
    def __init__(self, steps):
        self.executed_steps, self.calls, self.setting = steps, Calls(), Setting(("p",), steps)

    def key(self):
        return f"fake-{self.executed_steps}"

    def at(self, steps):
        assert steps == self.executed_steps
        return self

    def policy(self, reuse, name):
        return Policy(steps=self.executed_steps, reuse=reuse, name=name)

    def map_bytes(self, policy):
        return 10 * policy.reuse_steps


class FakeEngine:
    """Errors grow with age and earliness; a hash adds what makes a landscape rough."""

    def __init__(self, steps, delay=0.0):
        self.evaluator, self.delay, self.judged = FakeEvaluator(steps), delay, 0

    def score(self, row):
        age, psnr = 0, 60.0
        for step, reuse in enumerate(row):
            age = age + 1 if reuse else 0
            psnr -= age * (1 + 0.3 * (len(row) - step) / len(row))
        rough = hashlib.sha256(str(row).encode()).digest()[0] / 255
        return psnr + rough

    def run(self, policies, metrics, steps):
        for i, policy in enumerate(policies):
            self.judged += 1
            time.sleep(self.delay)
            yield i, dict.fromkeys(metrics, self.score(policy.reuse))
