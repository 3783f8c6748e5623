"""The Gaussian diffusion process: noising, the training loss, and the DDPM and DDIM samplers.

Equation numbers: DDPM is arXiv 2006.11239, improved DDPM is arXiv 2102.09672, DDIM is arXiv
2010.02502. alpha_bar_t is DDPM's; DDIM writes alpha_t for it.

Shapes: x is (N, C, ...), t is (N,) int64 in 0..num_timesteps-1. A step back also takes one int for
all of x, as the samplers do: its coefficients are then plain numbers, which takes half the time (and
a GPU nothing to look up). A model is called as `model(x, t, **model_kwargs)` with original timesteps
(N,) and returns (N, C, ...), or (N, 2C, ...) when it chooses the variance too. Half-precision model
outputs are brought to float32 first.
"""

import math
from collections import deque
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .likelihood import decoder_log_likelihood, mean_flat, normal_kl


class Coefficients(NamedTuple):
    """What the formulas need of the schedule at t; every field (num_timesteps,), (N, 1, ..) or a number."""

    sqrt_alphas_cumprod: object
    sqrt_one_minus_alphas_cumprod: object
    sqrt_recip_alphas_cumprod: object
    sqrt_recipm1_alphas_cumprod: object
    posterior_mean_coef1: object
    posterior_mean_coef2: object
    posterior_variance: object
    posterior_log_variance_clipped: object
    middle_log_variance: object  # log variance = middle + v * reach, v in [-1, 1]: improved DDPM eq. 15,
    reach_log_variance: object  # from log beta~_t to log beta_t; 0 where the variance is fixed
    middle_log_sigma: object  # the same for the noise that a step adds, -infinity at t = 0
    reach_log_sigma: object


class Transition(NamedTuple):
    """x_{t-1} = x0_scale x_0 + x_scale x_t + sigma noise."""

    x0_scale: object
    x_scale: object
    sigma: object


class GaussianDiffusion:
    """A diffusion process over all timesteps of `betas`.

    betas: (num_timesteps,), in (0, 1). predict_xstart: the model gives x_0, not the noise.
    variance: "learned" (a model of 2C channels), "fixed_small" (beta~_t) or "fixed_large" (beta_t).
    loss: "hybrid" (squared error, plus the bound where the variance is learned), "rescaled_hybrid"
        (the bound times num_timesteps / 1000) or "kl" (the bound alone, times num_timesteps).

    The schedule's attributes are (num_timesteps,) float64 arrays.
    """

    def __init__(self, *, betas, predict_xstart=False, variance="learned", loss="hybrid"):
        assert variance in ("learned", "fixed_small", "fixed_large"), variance
        assert loss in ("hybrid", "rescaled_hybrid", "kl"), loss
        self.predict_xstart, self.variance, self.loss = predict_xstart, variance, loss
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"Found betas of shape {betas.shape} from {betas.min()} to {betas.max()}, expected "
                "one row of numbers between 0 and 1."
            )
        self.num_timesteps = len(betas)
        self.alphas_cumprod = ab = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = prev = np.append(1.0, ab[:-1])

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7. At t = 0 its variance is 0; the log is t = 1's.
        self.posterior_variance = betas * (1.0 - prev) / (1.0 - ab)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = np.sqrt(prev) * betas / (1.0 - ab)
        self.posterior_mean_coef2 = np.sqrt(1.0 - betas) * (1.0 - prev) / (1.0 - ab)

        # Tables in float64: name -> (rows, num_timesteps); and on devices: + device, dtype.
        small, large = self.posterior_log_variance_clipped, np.log(np.append(first, betas[1:]))
        if variance == "learned":
            middle, reach = (np.log(betas) + small) / 2, (np.log(betas) - small) / 2
        else:
            middle, reach = small if variance == "fixed_small" else large, np.zeros_like(betas)
        schedule = Coefficients(
            sqrt_alphas_cumprod=np.sqrt(ab),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - ab),
            sqrt_recip_alphas_cumprod=np.sqrt(1.0 / ab),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / ab - 1.0),
            posterior_mean_coef1=self.posterior_mean_coef1,
            posterior_mean_coef2=self.posterior_mean_coef2,
            posterior_variance=self.posterior_variance,
            posterior_log_variance_clipped=small,
            middle_log_variance=middle,
            reach_log_variance=reach,
            middle_log_sigma=np.append(-np.inf, middle[1:] / 2),
            reach_log_sigma=reach / 2,
        )
        self._tables = {"schedule": np.stack(schedule)}
        self._tables_on = {}

    def model_timesteps(self, t):
        """Timesteps of this process, (N,) or one -> the same of those that the model was trained on."""
        return t

    def _rows(self, table, t, x):
        """The table's rows at t, each (N, 1, ..) against x, or () for one t; float32, or float64 where x is."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(t, int):
            key = table, "numbers", dtype
            if key not in self._tables_on:
                self._tables_on[key] = [row.unbind() for row in torch.tensor(self._tables[table].T, dtype=dtype)]
            return self._tables_on[key][t]
        key = table, t.device, dtype
        if key not in self._tables_on:
            self._tables_on[key] = torch.tensor(self._tables[table], dtype=dtype, device=t.device)
        rows = self._tables_on[key][:, t]
        return rows.reshape(*rows.shape, *[1] * (x.ndim - 1)).unbind()

    def _at(self, t, x):
        return Coefficients(*self._rows("schedule", t, x))

    # ---- the forward process ----------------------------------------------------------------

    def q_sample(self, x_start, t, noise=None):
        """A sample of q(x_t | x_0), DDPM eq. 4: (N, C, ...) -> (N, C, ...)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        c = self._at(t, x_start)
        return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """q(x_{t-1} | x_t, x_0), DDPM eq. 7: mean, variance and clipped log variance, as x_t."""
        c = self._at(t, x_t)
        mean = self._posterior_mean(c, x_start, x_t)
        log_variance = c.posterior_log_variance_clipped
        return mean, c.posterior_variance.expand_as(mean), log_variance.expand_as(mean)

    def _posterior_mean(self, c, x_start, x_t):
        return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t

    # ---- the model's share ------------------------------------------------------------------

    def _output(self, model, x, t, model_kwargs):
        """The model's prediction (N, C, ...) and its variance channels, as large; 0 where the variance is fixed."""
        t = self.model_timesteps(t)
        t = torch.full(x.shape[:1], t, device=x.device) if isinstance(t, int) else t
        output = model(x, t, **(model_kwargs or {}))
        output = output.to(torch.promote_types(x.dtype, torch.float32))
        channels = x.shape[1] * (2 if self.variance == "learned" else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"Found a model output of shape {tuple(output.shape)} for x of {tuple(x.shape)}, "
                f"expected {channels} channels: create model and diffusion with one learn_sigma."
            )
        return output.chunk(2, dim=1) if self.variance == "learned" else (output, torch.zeros_like(output))

    def _x_start(self, c, prediction, x, clip_denoised=False, denoised_fn=None):
        """The x_0 that the prediction stands for."""
        if self.predict_xstart:
            x_start = prediction
        else:  # DDPM eq. 15
            x_start = c.sqrt_recip_alphas_cumprod * x - c.sqrt_recipm1_alphas_cumprod * prediction
        x_start = x_start if denoised_fn is None else denoised_fn(x_start)
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t): a dict of "mean", "variance", "log_variance", "pred_xstart", as x.

        denoised_fn is applied to the predicted x_0 first, then clip_denoised limits it to [-1, 1].
        """
        prediction, v = self._output(model, x, t, model_kwargs)
        c = self._at(t, x)
        x_start = self._x_start(c, prediction, x, clip_denoised, denoised_fn)
        log_variance = c.middle_log_variance + v * c.reach_log_variance
        return {
            "mean": self._posterior_mean(c, x_start, x),
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The loss of each image at its timestep: a dict of (N,) tensors.

        "mse" is DDPM's L_simple (eq. 14), "vb" the variational bound's term at t in bits per
        dimension (eq. 5; absent where the variance is fixed and the loss not "kl"), "loss" their
        sum: L_hybrid (improved DDPM eq. 16). There vb trains the variance alone. L_vlb sums over t,
        so one t stands for num_timesteps of them; with eq. 16's lambda of 0.001 its weight is
        num_timesteps / 1000, which is the 1 of "hybrid" at the usual 1000 steps.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        prediction, v = self._output(model, x_t, t, model_kwargs)
        target = x_start if self.predict_xstart else noise
        terms = {"mse": mean_flat((target - prediction) ** 2)}
        if self.loss == "kl":
            terms["vb"] = self._bound(x_start, x_t, t, prediction, v)
            terms["loss"] = terms["vb"] * self.num_timesteps
        elif self.variance != "learned":
            terms["loss"] = terms["mse"]
        else:
            weight = self.num_timesteps / 1000 if self.loss == "rescaled_hybrid" else 1.0
            terms["vb"] = self._bound(x_start, x_t, t, prediction.detach(), v) * weight
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _bound(self, x_start, x_t, t, prediction, v):
        """One term of DDPM eq. 5, in bits per dimension: L_{t-1}, at t = 0 the decoder's; (N,)."""
        c = self._at(t, x_t)
        true_mean = self._posterior_mean(c, x_start, x_t)
        mean = self._posterior_mean(c, self._x_start(c, prediction, x_t), x_t)
        log_variance = c.middle_log_variance + v * c.reach_log_variance
        kl = normal_kl(true_mean, c.posterior_log_variance_clipped, mean, log_variance)
        nll = -decoder_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)

    # ---- one step back ----------------------------------------------------------------------

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        noise_fn=torch.randn_like,
    ):
        """x_t -> a sample of p(x_{t-1} | x_t), and the x_0 behind it: "sample", "pred_xstart".

        noise_fn(x) is called at t = 0 too, where its noise is multiplied by 0.
        """
        prediction, v = self._output(model, x, t, model_kwargs)
        c = self._at(t, x)
        x_start = self._x_start(c, prediction, x, clip_denoised, denoised_fn)
        mean = self._posterior_mean(c, x_start, x)
        sigma = (c.middle_log_sigma + v * c.reach_log_sigma).exp()
        return {"sample": torch.addcmul(mean, sigma, noise_fn(mean)), "pred_xstart": x_start}

    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        eta=0.0,
        noise_fn=torch.randn_like,
    ):
        """DDIM's step, eq. 12, as `p_sample`; eta in [0, 1] scales the noise it adds, eq. 16."""
        if eta not in self._tables:
            self._tables[eta] = self._ddim_table(eta)
        prediction, _ = self._output(model, x, t, model_kwargs)
        x_start = self._x_start(self._at(t, x), prediction, x, clip_denoised, denoised_fn)
        step = Transition(*self._rows(eta, t, x))
        mean = step.x0_scale * x_start + step.x_scale * x
        return {"sample": mean + step.sigma * noise_fn(mean), "pred_xstart": x_start}

    def _ddim_table(self, eta):
        """DDIM's transition in float64: (3, num_timesteps); at eta = 1 it is DDPM's eq. 7."""
        if not 0 <= eta <= 1:
            raise ValueError(f"Found eta={eta}, expected 0 (deterministic) to 1 (as much as DDPM).")
        ab, prev = self.alphas_cumprod, self.alphas_cumprod_prev
        sigma = eta * np.sqrt((1.0 - prev) / (1.0 - ab)) * np.sqrt(1.0 - ab / prev)  # eq. 16
        direction = np.sqrt((1.0 - prev - sigma**2) / (1.0 - ab))  # eq. 7, of (x - sqrt(ab) x_0)
        return np.stack(Transition(np.sqrt(prev) - direction * np.sqrt(ab), direction, sigma))

    # ---- all the way back -------------------------------------------------------------------

    def p_sample_loop(self, model, shape, noise=None, **options):
        """DDPM's sampler: the last "sample" of `p_sample_loop_progressive`, with its options."""
        return _last(self.p_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop(self, model, shape, noise=None, **options):
        """DDIM's sampler: the last "sample" of `ddim_sample_loop_progressive`, with its options."""
        return _last(self.ddim_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop_progressive(self, model, shape, noise=None, *, eta=0.0, **options):
        """As `p_sample_loop_progressive`, with DDIM's steps; eta as in `ddim_sample`."""
        return self.p_sample_loop_progressive(model, shape, noise, step=partial(self.ddim_sample, eta=eta), **options)

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        step_noise=None,
        step=None,
    ):
        """From noise to samples, without gradients: yields each step's "sample" and "pred_xstart".

        shape: (N, C, ...). noise: x_T of that shape, by default drawn on `device`, which by default
        is the model's. progress: show a bar. step_noise(x, i): the noise, shaped as x, that step i
        adds (i from num_timesteps - 1 down to 0, whose noise is multiplied by 0), in place of
        torch.randn_like(x); with it each image can have a noise stream of its own. step: the
        method that makes one step, by default `p_sample`.

        Raises ValueError when a noise has another shape, or when no device can be told.
        """
        step = self.p_sample if step is None else step
        if noise is None:
            noise = torch.randn(*shape, device=_device(model) if device is None else device)
        x = _noise_of(shape, noise).to(device, torch.promote_types(noise.dtype, torch.float32))
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            noise_fn = torch.randn_like
            if step_noise is not None:
                noise_fn = lambda x, i=i: _noise_of(shape, step_noise(x, i))  # noqa: E731
            with torch.no_grad():
                out = step(model, x, i, clip_denoised, denoised_fn, model_kwargs, noise_fn=noise_fn)
            yield out
            x = out["sample"]


def _last(steps):
    return deque(steps, maxlen=1).pop()["sample"]


def _noise_of(shape, noise):
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(
            f"Found noise of shape {tuple(noise.shape)}, expected {tuple(shape)}: give one noise for each sample."
        )
    return noise


def _device(model):
    owner = getattr(model, "__self__", model)  # of model.forward_with_cfg, the model
    if not isinstance(owner, torch.nn.Module):
        raise ValueError(f"Found neither noise nor device, and {model!r} is no module that has one: pass device.")
    return next(owner.parameters()).device
