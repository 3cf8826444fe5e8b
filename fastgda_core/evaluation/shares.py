"""Shares: what part of the influence on some queries falls on each payee, and how sure that is.

A payee is a group of training samples: a creator's, a tar's. Of one query its share is

    share = (its samples' influence) / (all samples' influence),   influence = max(score, 0),

and of several queries the mean of their shares, so that every query pays out the same. Shares of a set of queries add
up to 1, and shares times queries of two sets add up to those of both together.

Scores are noisy. A share is off in two ways. It is drawn anew with the noise: its standard error. And the positive part
of noise pays everybody: a sample without influence is paid 0.4 standard errors, so shares lean towards the payees'
numbers of samples. Standard errors know nothing of that, so the interval is as much wider as it can be.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fastgda_core.errors import UsageError

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

LEVEL = 0.95  # of all payees' intervals together
# E max(z, 0) of a standard normal z: what noise alone pays, and the most that it adds, as max is convex.
PAID_BY_NOISE = 1 / math.sqrt(2 * math.pi)
LOGISTIC = 1.702  # the logistic curve of this slope is within 0.0095 of the normal's distribution function
MANY = 1000  # degrees of freedom from which Student's distribution is taken for the normal one


@dataclass(frozen=True)
class Sums:
    """What the samples of one query add up to, each array (payees,) over the payees that have samples there.

    payee: numbers of the payees, each once.
    samples: how many were scored.
    influence: sum of max(score, 0).
    variance: of `influence` by the noise of the scores; NaN where that is not known.
    noise: sum of the standard errors of the scores; NaN where they are not known.
    """

    payee: Numbers
    samples: Numbers
    influence: Floats
    variance: Floats
    noise: Floats


@dataclass(frozen=True)
class QueryShares:
    """Shares of one query, each array (payees,) in the order of its sums.

    bounds: (3, payees): the share, the least and the most that it could be without what noise adds to sums of positive
        parts; three times the share where the noise is not known.
    errors: standard errors of these by the noise of the scores, (3, payees); NaN where that is not known.
    uniform: what each would have if all samples were paid the same.
    freedom: degrees of freedom of the errors.
    """

    bounds: Floats
    errors: Floats
    uniform: Floats
    freedom: int = MANY

    @property
    def share(self) -> Floats:
        return self.bounds[0]

    @property
    def standard_error(self) -> Floats:
        return self.errors[0]


@dataclass(frozen=True)
class Shares:
    """Shares of some queries, each array (payees,).

    share: mean over the queries.
    noise_error: its standard error by the noise of scores; NaN where that is not known.
    query_error: its standard error by the spread between queries; NaN of a single query.
    standard_error: both together, of what is known of them; NaN where nothing is.
    signal_to_noise: the least that the share could be without what noise adds, by its standard error; NaN where that is
        0 or not known. A payee without influence has about 0, however many samples the noise pays for.
    low, high: of LEVEL for all payees together; NaN where nothing is known.
    uniform: what each would have if all samples were paid the same.
    influence: sum of the influence over the queries, in units of scores.
    paid: in how many queries it has a share.
    queries: how many queries have any influence; silent: how many have none, and count for nothing.
    """

    share: Floats
    noise_error: Floats
    query_error: Floats
    standard_error: Floats
    signal_to_noise: Floats
    low: Floats
    high: Floats
    uniform: Floats
    influence: Floats
    paid: Numbers
    queries: int
    silent: int

    @property
    def proven(self) -> NDArray[np.bool_]:
        """Whether the interval lies above 0."""
        return self.low > 0

    @property
    def lift(self) -> Floats:
        """Share by what paying all samples the same would give; NaN where no sample was scored."""
        return np.divide(self.share, self.uniform, out=np.full_like(self.share, np.nan), where=self.uniform > 0)


def sums_of(scores: Floats, errors: Floats, payee: Numbers) -> Sums:
    """Add up the scores of one query by payee.

    The variance of max(score, 0) is taken as error^2 Phi(score / error), which is no less than it is, and at most 0.18
    error^2 more.

    Args:
        scores: (samples,).
        errors: standard errors of the scores, independent of each other, (samples,); NaN where not known.
        payee: number of each sample's payee, (samples,).
    """
    payees, place = np.unique(payee, return_inverse=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        certainty = np.clip(np.where(errors > 0, scores / errors, 0.0), -30, 30)

    def added(values: Floats) -> Floats:
        return np.bincount(place, values, len(payees)).astype(np.float64)

    return Sums(
        payee=payees,
        samples=np.bincount(place, minlength=len(payees)),
        influence=added(np.maximum(scores, 0)),
        variance=added(errors**2 / (1 + np.exp(-LOGISTIC * certainty))),
        noise=added(errors),
    )


def query_shares(sums: Sums) -> QueryShares:
    """Return the shares of one query that has some influence: see `Sums`.

    The standard error is that of a ratio by the delta method: a payee's influence is a part of the total, so noise that
    raises it raises both,

        Var(V / T) = ((1 - share)^2 Var(V) + share^2 Var(T - V)) / T^2.
    """
    own, rest = sums.influence, sums.influence.sum() - sums.influence
    added = PAID_BY_NOISE * sums.noise
    if np.isnan(added).any():
        bounds, wholes = np.stack([own / (own + rest)] * 3), np.stack([own + rest] * 3)
    else:
        owns = np.stack([own, np.maximum(own - added, 0), own])
        rests = np.stack([rest, rest, np.maximum(rest - (added.sum() - added), 0)])
        wholes = owns + rests
        # Nothing but noise on both sides: the share could be anything.
        bounds = np.divide(owns, wholes, out=np.array([[0.0], [0.0], [1.0]]).repeat(len(own), 1), where=wholes > 0)
    others = np.maximum(sums.variance.sum() - sums.variance, 0)
    spread = np.sqrt((1 - bounds) ** 2 * sums.variance + bounds**2 * others)
    errors = np.divide(spread, wholes, out=np.zeros_like(spread), where=wholes > 0)
    return QueryShares(bounds, errors, sums.samples / sums.samples.sum())


def shares_of_groups(by_group: Floats, payee: Numbers) -> tuple[Sums, QueryShares]:
    """Return the shares of one query whose scores are means over groups of its noise.

    The noise of a group is common to all samples, so the errors are a jackknife's over whole groups, and no formula for
    independent errors.

    Args:
        by_group: scores, (groups, samples).
        payee: number of each sample's payee, (samples,).

    Raises:
        UsageError: no sample has any positive influence.
    """
    groups = len(by_group)
    scores = by_group.mean(0)
    errors = by_group.std(0, ddof=1) / math.sqrt(groups) if groups > 1 else np.full_like(scores, np.nan)
    without = (scores * groups - by_group) / (groups - 1) if groups > 1 else by_group
    if not (np.vstack([scores, without]) > 0).any(1).all():
        raise UsageError("no training image has any positive influence on this one: there is nothing to share")
    sums = sums_of(scores, errors, payee)
    mine = query_shares(sums)
    if groups < 2:
        return sums, mine
    bounds = np.stack([query_shares(sums_of(each, errors, payee)).bounds for each in without])
    return sums, replace(mine, errors=np.sqrt((groups - 1) * bounds.var(0)), freedom=groups - 1)


class Period:
    """The shares of queries that come one after the other; its memory is a few numbers for each payee.

    Args:
        payees: how many there are.
    """

    def __init__(self, payees: int) -> None:
        self.queries = self.silent = 0
        self._freedom = MANY
        self._bounds, self._squares, self._errors = (np.zeros((3, payees)) for _ in range(3))
        self._uniform, self._influence, self._paid = np.zeros(payees), np.zeros(payees), np.zeros(payees, np.int64)

    def add(self, sums: Sums, shares: QueryShares | None = None) -> None:
        """Count one more query, with its shares where these are not those of `query_shares`."""
        if not sums.influence.sum() > 0:
            self.silent += 1
            return
        mine, at = shares or query_shares(sums), sums.payee
        self.queries += 1
        self._freedom = min(self._freedom, mine.freedom)
        self._bounds[:, at] += mine.bounds
        self._squares[:, at] += mine.bounds**2
        self._errors[:, at] += mine.errors
        if np.isnan(mine.errors).any():  # then the errors of means are not known, also of payees without a sample here
            self._errors[:] = np.nan
        self._uniform[at] += mine.uniform
        self._influence[at] += sums.influence
        self._paid[at] += sums.influence > 0

    def shares(self) -> Shares:
        """Return the shares of all queries that were added.

        All queries are scored under one noise plan, so the noise of a sample is the same in each and need not average
        out: the error of the mean is at most the mean of the errors, and is taken as that.

        Raises:
            UsageError: no query has any influence.
        """
        count = self.queries
        if count == 0:
            raise UsageError(
                f"none of {self.silent} queries has any positive influence: there is nothing to share"
                if self.silent
                else "no query is asked for: there is nothing to share"
            )
        means, noise_errors = self._bounds / count, self._errors / count
        query_errors = np.full_like(means, np.nan)
        if count > 1:
            query_errors = np.sqrt(np.maximum(self._squares / count - means**2, 0) / (count - 1))
        known = np.stack([noise_errors, query_errors])
        errors = np.where(np.isnan(known).all(0), np.nan, np.sqrt(np.nansum(known**2, axis=0)))
        payees = max(int((self._uniform > 0).sum()), 1)  # with samples, whose intervals hold together
        reach = quantile(1 - (1 - LEVEL) / 2 / payees, min(self._freedom, count - 1 if count > 1 else MANY))
        return Shares(
            share=means[0],
            noise_error=noise_errors[0],
            query_error=query_errors[0],
            standard_error=errors[0],
            signal_to_noise=np.divide(means[1], errors[1], out=np.full_like(means[1], np.nan), where=errors[1] > 0),
            low=np.maximum(means[1] - reach * errors[1], 0),
            high=np.minimum(means[2] + reach * errors[2], 1),
            uniform=self._uniform / count,
            influence=self._influence,
            paid=self._paid,
            queries=count,
            silent=self.silent,
        )


@functools.lru_cache(maxsize=256)
def quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's distribution above its median, by bisection; from `MANY` on the normal one's."""
    if freedom >= MANY:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _above(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _above(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2


def _above(t: float, freedom: int) -> float:
    """Return the probability that Student's t is above a positive value.

    Source: Abramowitz & Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (number + 1) / (number + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - within) / 2
