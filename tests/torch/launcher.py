"""torch's own tests of its launcher, with `muster run` in torchrun's place.

    python launcher.py MUSTER FOLDER_OF_TORCH_TESTS [NAME...]

The functions that a test calls are torch's; only `torch.distributed.run.main` is another one. Says a line for each
test: its result and its name.
"""

import importlib.util
import os
import subprocess
import sys
import types
import unittest

import torch.distributed.launch
import torch.distributed.run
from torch.distributed.elastic import events
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# What a command line is refused with, and what ranks that have failed are told by.
USAGE, FAILED = 2, 1

# Tests that do not apply, and why.
AGENT = "replaces a class of torchrun's agent, which is not here"
SKIPPED = {
    "test_launch_elastic_agent_raise_exception": AGENT,
    "test_launch_shutdown": AGENT,
    "test_nproc_gpu_launch_configurations": "replaces torch's functions that count GPUs",
    "test_min_max_nodes_parse": "calls a function of torchrun's",
    "test_launch_without_env": "is of torch.distributed.launch, which gives each rank a --local-rank",
}


def muster_run(args=None):
    """Runs `muster run` to its end, and raises what torchrun would."""
    end = subprocess.run(
        [sys.argv[1], "run", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # As torchrun's ranks do, which a test may have redirected.
    print(end.stdout, end="")
    print(end.stderr, end="", file=sys.stderr)
    if end.returncode == USAGE:
        raise ValueError(end.stderr)
    if end.returncode == FAILED:
        # The event that torchrun records of a run that has failed, which a test counts.
        events.record(events.Event("muster run", events.EventSource.AGENT))
        raise ChildFailedError("muster run", {0: ProcessFailure(0, 0, FAILED, "")})
    if end.returncode != 0:
        raise RuntimeError(f"exit code {end.returncode}: {end.stderr}")


def launch_main(args):
    """torch.distributed.launch, as far as it is torchrun."""
    muster_run([arg for arg in args if arg not in ("--use-env", "--use_env")])


def common_utils():
    """The few names of torch's test library that these tests import: it needs packages of its own."""
    module = types.ModuleType("torch.testing._internal.common_utils")
    module.TEST_WITH_DEV_DBG_ASAN = module.TEST_WITH_ASAN = module.TEST_WITH_TSAN = False
    module.IS_CI = module.IS_WINDOWS = module.IS_MACOS = False
    module.TestCase = unittest.TestCase
    module.run_tests = unittest.main
    module.skip_but_pass_in_sandcastle_if = unittest.skipIf
    module.skip_but_pass_in_sandcastle = unittest.skip
    module.skip_if_pytest = module.skipIfRocm = lambda test: test
    return module


class Result(unittest.TestResult):
    """A line for each test."""

    def say(self, test, what, why=""):
        why = f": {why.strip().splitlines()[-1]}" if why.strip() else ""
        print(f"RESULT {what} {test.id().rsplit('.', 1)[-1]}{why}", flush=True)

    def addSuccess(self, test):
        self.say(test, "ok")

    def addSkip(self, test, reason):
        self.say(test, "skipped", reason)

    def addFailure(self, test, err):
        self.say(test, "FAILED", self._exc_info_to_string(err, test))

    addError = addFailure


def load(path):
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main():
    sys.modules["torch.testing._internal.common_utils"] = common_utils()
    torch.distributed.run.main = muster_run
    torch.distributed.launch.main = launch_main
    folder = sys.argv[2]
    suite = unittest.TestSuite()
    for file in ["test_run.py", "launch_test.py"]:
        module = load(os.path.join(folder, file))
        loaded = unittest.defaultTestLoader.loadTestsFromModule(module)
        for case in loaded:
            for test in case:
                name = test.id().rsplit(".", 1)[-1]
                if sys.argv[3:] and name not in sys.argv[3:]:
                    continue
                if name in SKIPPED:
                    why = SKIPPED[name]
                    print(f"RESULT passed-over {name}: it {why}", flush=True)
                    continue
                suite.addTest(test)
    suite.run(Result())


if __name__ == "__main__":
    main()
