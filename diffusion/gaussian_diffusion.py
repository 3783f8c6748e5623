"""The Gaussian diffusion process: noising, the training loss, and the DDPM and DDIM samplers.

Equation numbers: DDPM is arXiv 2006.11239, improved DDPM is arXiv 2102.09672, DDIM is arXiv 2010.02502. alpha_bar_t is
DDPM's notation; DDIM writes alpha_t for it.

Shapes: x is (N, C, ...), t is (N,) int64 in 0..num_timesteps-1. A step back also accepts one int for all N, as the
samplers pass it: its coefficients are then scalars, which takes half the time. A model is called as
`model(x, t, **model_kwargs)` with original timesteps (N,) and returns (N, C, ...), or (N, 2C, ...) if it also chooses the
variance. Outputs in half precision are converted to float32 first.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from .coefficients import Coefficients, DDIMCoefficients, Tables
from .likelihood import decoder_log_likelihood, mean_flat, normal_kl


class GaussianDiffusion:
    """A diffusion process over all timesteps of `betas`.

    betas           (num_timesteps,), in (0, 1)
    predict_xstart  the model predicts x_0, not the noise
    variance        "learned" (the model returns 2C channels), "fixed_small" (beta~_t) or "fixed_large" (beta_t)
    loss            "hybrid" (mean squared error, plus the bound if the variance is learned), "rescaled_hybrid" (the bound
                    times num_timesteps / 1000) or "kl" (the bound alone, times num_timesteps)

    The attributes of the schedule are float64 arrays (num_timesteps,).

    Raises ValueError if `betas` has another shape or range.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray | Sequence[float],
        predict_xstart: bool = False,
        variance: str = "learned",
        loss: str = "hybrid",
    ):
        assert variance in ("learned", "fixed_small", "fixed_large"), variance
        assert loss in ("hybrid", "rescaled_hybrid", "kl"), loss
        self.predict_xstart, self.variance, self.loss = predict_xstart, variance, loss
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"Found betas of shape {betas.shape} from {betas.min()} to {betas.max()}, expected one dimension and "
                "values between 0 and 1."
            )
        self.num_timesteps = len(betas)
        self.alphas_cumprod = ab = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = prev = np.append(1.0, ab[:-1])

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7. Its variance is 0 at t = 0; the clipped log is then that of t = 1.
        self.posterior_variance = betas * (1.0 - prev) / (1.0 - ab)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = np.sqrt(prev) * betas / (1.0 - ab)
        self.posterior_mean_coef2 = np.sqrt(1.0 - betas) * (1.0 - prev) / (1.0 - ab)

        # p(x_{t-1} | x_t): the log variance is between those of beta~_t and beta_t, improved DDPM eq. 15
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
        self._tables = Tables()  # "schedule" and, for each eta that is used, DDIM's
        self._tables.add("schedule", schedule)

    def model_timesteps(self, t: torch.Tensor | int) -> torch.Tensor | int:
        """Convert timesteps of this process, (N,) or one, to those that the model was trained on."""
        return t

    def _at(self, t, x):
        return Coefficients(*self._tables.at("schedule", t, x))

    # ---- the forward process ---------------------------------------------------------------------

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Sample x_t from q(x_t | x_0), DDPM eq. 4: x_start and noise (N, C, ...) -> (N, C, ...)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        c = self._at(t, x_start)
        return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7, each (N, C, ...)."""
        c = self._at(t, x_t)
        mean = self._posterior_mean(c, x_start, x_t)
        log_variance = c.posterior_log_variance_clipped
        return mean, c.posterior_variance.expand_as(mean), log_variance.expand_as(mean)

    def _posterior_mean(self, c, x_start, x_t):
        return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t

    # ---- the model's prediction ------------------------------------------------------------------

    def _output(self, model, x, t, model_kwargs):
        """Return the prediction (N, C, ...) and the variance channels v (N, C, ...), 0 if the variance is fixed."""
        t = self.model_timesteps(t)
        t = torch.full(x.shape[:1], t, device=x.device) if isinstance(t, int) else t
        output = model(x, t, **(model_kwargs or {}))
        output = output.to(torch.promote_types(x.dtype, torch.float32))
        channels = x.shape[1] * (2 if self.variance == "learned" else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"Found a model output of shape {tuple(output.shape)} for x of {tuple(x.shape)}, expected {channels} "
                "channels: create model and diffusion with the same learn_sigma."
            )
        return output.chunk(2, dim=1) if self.variance == "learned" else (output, torch.zeros_like(output))

    def _x_start(self, c, prediction, x, clip_denoised=False, denoised_fn=None):
        """Return the x_0 that follows from the prediction."""
        if self.predict_xstart:
            x_start = prediction
        else:  # DDPM eq. 15
            x_start = c.sqrt_recip_alphas_cumprod * x - c.sqrt_recipm1_alphas_cumprod * prediction
        x_start = x_start if denoised_fn is None else denoised_fn(x_start)
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def p_mean_variance(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor | int,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return "mean", "variance" and "log_variance" of p(x_{t-1} | x_t), and "pred_xstart", each (N, C, ...).

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

    def training_losses(
        self,
        model: Callable,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss of each image at its timestep, and its terms, each (N,).

        "mse" is DDPM's L_simple (eq. 14). "vb" is the term of the variational bound at t, in bits per dimension (eq. 5);
        it is absent if the variance is fixed and the loss is not "kl". "loss" is their sum, L_hybrid (improved DDPM
        eq. 16), in which vb trains the variance alone. L_vlb is a sum over all timesteps, so that vb at a random t
        estimates L_vlb / num_timesteps. The weight 0.001 of L_vlb in eq. 16 thus is a weight of num_timesteps / 1000 for
        vb; "hybrid" has the weight 1, the same at the usual 1000 timesteps.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        prediction, v = self._output(model, x_t, t, model_kwargs)
        return self._loss_terms(self._at(t, x_t), t, x_start, x_t, noise, prediction, v)

    def compile_losses(self, **options) -> None:
        """Compile the loss terms with `torch.compile` and its `options`: some 200 small operations become a few."""
        self._loss_terms = torch.compile(self._loss_terms, **options)

    def _loss_terms(self, c, t, x_start, x_t, noise, prediction, v):
        target = x_start if self.predict_xstart else noise
        terms = {"mse": mean_flat((target - prediction) ** 2)}
        if self.loss == "kl":
            terms["vb"] = self._bound(c, x_start, x_t, t, prediction, v)
            terms["loss"] = terms["vb"] * self.num_timesteps
        elif self.variance != "learned":
            terms["loss"] = terms["mse"]
        else:
            weight = self.num_timesteps / 1000 if self.loss == "rescaled_hybrid" else 1.0
            terms["vb"] = self._bound(c, x_start, x_t, t, prediction.detach(), v) * weight
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _bound(self, c, x_start, x_t, t, prediction, v):
        """Return a term of DDPM eq. 5 in bits per dimension (N,): L_{t-1}, or the decoder's L_0 at t = 0."""
        true_mean = self._posterior_mean(c, x_start, x_t)
        mean = self._posterior_mean(c, self._x_start(c, prediction, x_t), x_t)
        log_variance = c.middle_log_variance + v * c.reach_log_variance
        kl = normal_kl(true_mean, c.posterior_log_variance_clipped, mean, log_variance)
        nll = -decoder_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)

    # ---- one step back ---------------------------------------------------------------------------

    def p_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor | int,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        noise_fn: Callable = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """Sample x_{t-1} from p(x_{t-1} | x_t); return it and the predicted x_0: "sample", "pred_xstart".

        noise_fn(x) returns the noise (N, C, ...). It is also called at t = 0, where its result is multiplied by 0. For
        the other arguments, see `p_mean_variance`.
        """
        prediction, v = self._output(model, x, t, model_kwargs)
        c = self._at(t, x)
        x_start = self._x_start(c, prediction, x, clip_denoised, denoised_fn)
        mean = self._posterior_mean(c, x_start, x)
        sigma = (c.middle_log_sigma + v * c.reach_log_sigma).exp()
        return {"sample": torch.addcmul(mean, sigma, noise_fn(mean)), "pred_xstart": x_start}

    def ddim_sample(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor | int,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        noise_fn: Callable = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """Make DDIM's step (eq. 12); arguments and result are those of `p_sample`.

        eta in 0..1 scales the added noise (eq. 16): 0 is deterministic, 1 is as random as DDPM. Raises ValueError if it
        is out of range.
        """
        if eta not in self._tables:
            self._tables.add(eta, self._ddim_coefficients(eta))
        prediction, _ = self._output(model, x, t, model_kwargs)
        x_start = self._x_start(self._at(t, x), prediction, x, clip_denoised, denoised_fn)
        step = DDIMCoefficients(*self._tables.at(eta, t, x))
        mean = step.x0_scale * x_start + step.x_scale * x
        return {"sample": mean + step.sigma * noise_fn(mean), "pred_xstart": x_start}

    def _ddim_coefficients(self, eta):
        """Return DDIM's step at every timestep, float64 (num_timesteps,) each; at eta = 1 it is DDPM's eq. 7."""
        if not 0 <= eta <= 1:
            raise ValueError(f"Found eta={eta}, expected 0 (deterministic) to 1 (as random as DDPM).")
        ab, prev = self.alphas_cumprod, self.alphas_cumprod_prev
        sigma = eta * np.sqrt((1.0 - prev) / (1.0 - ab)) * np.sqrt(1.0 - ab / prev)  # eq. 16
        direction = np.sqrt((1.0 - prev - sigma**2) / (1.0 - ab))  # eq. 7, coefficient of x - sqrt(ab) x_0
        return DDIMCoefficients(np.sqrt(prev) - direction * np.sqrt(ab), direction, sigma)

    # ---- all steps back --------------------------------------------------------------------------

    def p_sample_loop(
        self, model: Callable, shape: Sequence[int], noise: torch.Tensor | None = None, **options
    ) -> torch.Tensor:
        """Sample with DDPM: the last "sample" of `p_sample_loop_progressive`, which lists the options."""
        return _last(self.p_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop(
        self, model: Callable, shape: Sequence[int], noise: torch.Tensor | None = None, **options
    ) -> torch.Tensor:
        """Sample with DDIM: the last "sample" of `ddim_sample_loop_progressive`, which lists the options."""
        return _last(self.ddim_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop_progressive(
        self, model: Callable, shape: Sequence[int], noise: torch.Tensor | None = None, *, eta: float = 0.0, **options
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Sample with DDIM and yield every step: `p_sample_loop_progressive` with the eta of `ddim_sample`."""
        return self.p_sample_loop_progressive(model, shape, noise, step=partial(self.ddim_sample, eta=eta), **options)

    def p_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        step_noise: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        step: Callable | None = None,
        steps: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Sample from noise, without gradients, and yield the "sample" and "pred_xstart" of every step.

        shape       (N, C, ...)
        noise       x_T of that shape; by default it is drawn on `device`
        device      by default that of the noise, or else the model's
        progress    show a progress bar
        step_noise  step_noise(x, i) returns the noise, shaped as x, that step i adds, instead of torch.randn_like(x); i
                    runs from num_timesteps - 1 down to 0, where the noise is multiplied by 0. With it each image can have
                    its own noise stream
        step        the method that makes one step, by default `p_sample`
        steps       make only the last steps, 1 to num_timesteps, from `noise` as x at t = steps - 1; by default all

        The others are those of `p_sample`. Raises ValueError if noise has another shape, or if neither noise nor device
        is given and the model is not a module.
        """
        step = self.p_sample if step is None else step
        if noise is None:
            noise = torch.randn(*shape, device=_device(model) if device is None else device)
        x = _noise_of(shape, noise).to(device, torch.promote_types(noise.dtype, torch.float32))
        for i in tqdm(range((steps or self.num_timesteps) - 1, -1, -1), disable=not progress):
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
            f"Found noise of shape {tuple(noise.shape)}, expected {tuple(shape)}: pass one noise for each sample."
        )
    return noise


def _device(model):
    owner = getattr(model, "__self__", model)  # the model of a bound method such as model.forward_with_cfg
    if not isinstance(owner, torch.nn.Module):
        raise ValueError(f"Found neither noise nor device, and {model!r} is not a module that has one: pass device.")
    return next(owner.parameters()).device
