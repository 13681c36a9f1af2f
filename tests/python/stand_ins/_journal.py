"""What the stand-ins for experiment trackers were called with."""

calls = []


def record(name):
    return lambda *positional, **named: calls.append((name, positional, named))
