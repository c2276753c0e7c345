"""Scaling law: the fit finds a law it was given, the interval is regression's, and too few runs are
refused."""

import numpy as np
import pytest

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.pretraining.scaling import (
    active_parameters,
    compute_optimal,
    fit_scaling_law,
    predict_loss,
    scaling_law_loss,
)

TRUE = np.array([np.log(1.8), np.log(60), 0.3, np.log(600), 0.45])
N, D = (x.ravel() for x in np.meshgrid([0.5e6, 1e6, 2.5e6], [0.25e6, 0.5e6, 1e6, 2e6]))


def test_it_finds_the_law_it_was_given():
    law = fit_scaling_law(N, D, scaling_law_loss(TRUE, N, D))
    assert law["spread"] < 1e-4 and law["free"] == 7
    for n, d in ((1e6, 1e6), (1e7, 6e6)):
        assert predict_loss(law, n, d)["loss"] == pytest.approx(
            scaling_law_loss(TRUE, n, d), rel=2e-3
        )


def test_the_interval_widens_with_distance_and_noise():
    width = lambda noise, n, d: (lambda p: np.log(p["high"] / p["low"]))(
        predict_loss(
            fit_scaling_law(
                N,
                D,
                scaling_law_loss(TRUE, N, D) * np.exp(noise * np.resize([1, -1, -1, 1, 1, -1], 12)),
            ),
            n,
            d,
        )
    )
    assert width(0.002, 1e6, 1e6) < width(0.002, 1e7, 6e6) and width(0.002, 1e7, 6e6) < width(
        0.008, 1e7, 6e6
    )
    law = fit_scaling_law(
        N,
        D,
        scaling_law_loss(TRUE, N, D) * np.exp(0.005 * np.random.default_rng(1).standard_normal(12)),
    )
    said = predict_loss(law, 1e6, 1e6)
    assert (
        said["low"] < said["loss"] < said["high"]
        and np.log(said["high"] / said["loss"]) > 2.3 * law["spread"]
    )  # t with 7 degrees of freedom, and the fit's own doubt


def test_active_parameters_are_what_a_token_meets():
    pytest.importorskip("torch")
    from llmeco_nb.models.decoder import decoder_config, decoder_flops, new_decoder

    c = decoder_config(500, "2x64", 32)
    products = sum(
        p.numel() for n, p in new_decoder(500, "2x64", 32).named_parameters() if p.ndim == 2
    )
    assert products <= active_parameters(c) <= products + 1000  # the norms' scales are the rest
    assert decoder_flops(c, 0, training=False) == 2 * products


def test_a_budget_is_shared_out_where_the_derivative_is_zero():
    law = fit_scaling_law(N, D, scaling_law_loss(TRUE, N, D))
    n, d = compute_optimal(law, 1e14)
    assert 6 * n * d == pytest.approx(1e14)
    for other in (n / 2, n * 2):
        assert scaling_law_loss(law["p"], other, 1e14 / 6 / other) > scaling_law_loss(
            law["p"], n, d
        )


def test_refusals():
    loss = scaling_law_loss(TRUE, N, D)
    with pytest.raises(UsageError, match="at least six"):
        fit_scaling_law(N[:5], D[:5], loss[:5])
    with pytest.raises(UsageError, match="1 sizes"):
        fit_scaling_law(np.full(12, 1e6), D, loss)
    with pytest.raises(UsageError, match="1 lengths"):
        fit_scaling_law(N, np.full(12, 1e6), loss)
    with pytest.raises(DataError, match="positive"):
        fit_scaling_law(N, D, np.where(N == N[0], np.nan, loss))
    law = fit_scaling_law(N, D, loss)
    for level in (95, 1, 0, -0.5, np.nan):
        with pytest.raises(UsageError, match=f"between 0 and 1, such as 0.95; found {level}"):
            predict_loss(law, 1e7, 6e6, level)
