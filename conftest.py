"""What holds for the tests of all folders."""

pytest_plugins = ["tests.order", "tests.outcome", "tests.properties", "tests.skips"]
