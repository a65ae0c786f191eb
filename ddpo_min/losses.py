"""The losses of the paper, each for one micro-batch of samples at one denoising step."""
import torch


def ddpo_sf_loss(log_p, advantage):
    """REINFORCE: its gradient is the score-function estimate.

    L = -mean_b [ A_b log p(x_prev | x_t, c) ]    [paper Sec. 4.3, DDPO_SF]
    log_p, advantage: (B,); returns a scalar.
    """
    return -(advantage * log_p).mean()


def ddpo_is_loss(ratio, advantage, clip_range):
    """PPO's clipped objective on the importance ratio: several updates may use the same samples.

    L = mean_b max( -A_b ratio_b, -A_b clip(ratio_b, 1 - clip_range, 1 + clip_range) )
    [paper Sec. 4.3, DDPO_IS; clipped as PPO Eq. 7]
    ratio = exp(log_p - log_p_old), advantage: (B,); returns a scalar.
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


def rwr_loss(eps_hat, eps, weight):
    """Reward-weighted regression: the denoising loss on the model's own pictures, each with its weight.

    L = mean_b [ w_b mean_d (eps_hat - eps)^2 ]    [paper Sec. 4.2]
    eps_hat, eps: (B, 4, h, w), predicted (guided if training is) and true noise; weight: (B,); returns a scalar.
    """
    return (weight * ((eps_hat - eps) ** 2).flatten(1).mean(dim=1)).mean()


def step_kl(eps, eps_base, w_t):
    """How far a denoising step has moved from the base model's: the exact KL of two Gaussians of the same sigma_t.

    KL = mean_d [ (mu - mu_base)^2 / (2 sigma_t^2) ] = w_t^2 mean_d (eps - eps_base)^2 / 2
    eps, eps_base: (B, 4, h, w); w_t: float, of step_weights(). Averaged over a sample's dimensions, as the
    log-probability is; returns (B,).
    """
    return 0.5 * w_t ** 2 * ((eps - eps_base) ** 2).flatten(1).mean(dim=1)
