"""The two policy-gradient losses of the paper, for one denoising step of a batch."""
import torch


def ddpo_sf_loss(log_p, advantage):
    """REINFORCE: its gradient is the score-function estimate.

    L = -mean_b [ A_b log p(x_prev | x_t, c) ]    [paper Sec. 4.3, DDPO_SF]
    log_p, advantage: (B,); returns a scalar.
    """
    return -(advantage * log_p).mean()


def ddpo_is_loss(log_p, log_p_old, advantage, clip_range):
    """PPO's clipped objective on the importance ratio: several updates may use the same samples.

    L = mean_b max( -A_b ratio_b, -A_b clip(ratio_b, 1 - clip_range, 1 + clip_range) ),  ratio = exp(log_p - log_p_old)
    [paper Sec. 4.3, DDPO_IS; clipped as PPO Eq. 7].   log_p, log_p_old, advantage: (B,); returns (scalar, ratio (B,)).
    """
    ratio = torch.exp(log_p - log_p_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean(), ratio
