class ASHAScheduler:
    def __init__(self, grace_period, reduction_factor):
        assert (grace_period, reduction_factor) == (2, 3)
