"""Where a realised frequency may lie: exact binomial bounds, without scipy."""


def central_band(prob: float, num_draws: int) -> tuple[float, float]:
    """Between which frequencies `num_draws` draws of probability `prob` fall, but for 2.5 % at most on either side.

    Example:
        >>> central_band(0.5, 10)  # 2 to 8 of 10: P(k < 2) = P(k > 8) = 11 / 1024
        (0.2, 0.8)
        >>> central_band(1.0, 10)
        (1.0, 1.0)
    """
    if prob in (0.0, 1.0):
        return prob, prob
    # Relative to the most likely count, by the ratio of neighbours: neither factorials nor underflow. What is left out
    # is too far from the mean to matter for 2.5 %.
    mode = min(int((num_draws + 1) * prob), num_draws)
    odds = prob / (1 - prob)
    below, above = [1.0], [1.0]
    for k in range(mode, 0, -1):
        below.append(below[-1] * k / (num_draws - k + 1) / odds)
        if below[-1] < 1e-12:
            break
    for k in range(mode, num_draws):
        above.append(above[-1] * (num_draws - k) / (k + 1) * odds)
        if above[-1] < 1e-12:
            break
    tail = 0.025 * (sum(below) + sum(above) - 1)
    lowest, highest = mode - len(below) + 1, mode + len(above) - 1
    return _quantile(below[::-1] + above[1:], tail, lowest) / num_draws, (
        highest - _quantile(above[::-1] + below[1:], tail, 0)
    ) / num_draws


def _quantile(weights: list[float], tail: float, first: int) -> int:
    """The first count whose cumulated weight exceeds `tail`."""
    total = 0.0
    for count, weight in enumerate(weights, start=first):
        total += weight
        if total > tail:
            return count
    raise AssertionError("the weights sum to forty tails")
