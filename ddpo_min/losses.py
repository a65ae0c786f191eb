"""The losses, each for one micro-batch: DDPO's at one denoising step, the others' at a timestep for each sample."""
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


def matching_log_prob(v_hat, v, weight, power=1.0):
    """What takes the log-probability's place in Advantage-Weighted Matching: minus the denoising error.

    log p = -(weight_b / power) (mean_d (v_hat - v)^2)^power    [AWM's code: weighting "t" is power 1, "ghuber" 0.25]
    v_hat, v: (B, 4, h, w), predicted and true velocity or noise, see velocity_units(); weight: (B,); power: in (0, 1],
    below 1 a prediction that is far off pulls less. Returns (B,). Its ratio goes into ddpo_is_loss().
    """
    return -weight / power * ((v_hat - v) ** 2).flatten(1).mean(dim=1) ** power


def nft_loss(v_hat, v_old, v, advantage, weight, beta, advantage_clip):
    """DiffusionNFT: a good policy and a bad one, mirrored at the old one; each learns the picture by its share.

    L = (Z / beta) mean_b weight_b [ r E(v+) + (1 - r) E(v-) ],   Z = advantage_clip, r = (1 + A_b / Z) / 2 in [0, 1]
    v+ = v_old + beta (v_hat - v_old), v- = v_old - beta (v_hat - v_old), E(u) = mean_d (u - v)^2 / sg(mean_d |u - v|)
    [DiffusionNFT Eq. 5; E and the factor Z / beta from its code]
    v_hat, v_old, v: (B, 4, h, w), as above, v_old of the old policy; advantage in +-Z, weight: (B,); returns a scalar.
    """
    share, change = (1 + advantage / advantage_clip) / 2, beta * (v_hat - v_old)
    off = [(v_old + sign * change - v).flatten(1) for sign in (1, -1)]
    good, bad = ((u ** 2).mean(dim=1) / u.detach().abs().mean(dim=1) for u in off)
    return advantage_clip / beta * (weight * (share * good + (1 - share) * bad)).mean()


def ram_loss(v_hat, v_old, v_base, v, advantage, weight, kl_weight):
    """Reinforce Adjoint Matching: regression onto the base model's prediction, corrected by the reward.

    L = k mean_b weight_b mean_d (v_hat - target)^2,   target = v_base + (A_b / k) (v - v_old)    [RAM Eq. 17]
    v_hat, v_old, v_base, v: (B, 4, h, w), as above, v_base of the base model; advantage, weight: (B,); kl_weight: k,
    above 0, the pull to the base model (1 / k is RAM's reward multiplier; the k in front is ours: it keeps the rest of
    the gradient as it is). Returns a scalar.
    """
    target = v_base + (advantage / kl_weight)[:, None, None, None] * (v - v_old)
    return kl_weight * (weight * ((v_hat - target) ** 2).flatten(1).mean(dim=1)).mean()


def step_kl(eps, eps_base, w_t):
    """How far a denoising step has moved from the base model's: the exact KL of two Gaussians of the same sigma_t.

    KL = mean_d [ (mu - mu_base)^2 / (2 sigma_t^2) ] = w_t^2 mean_d (eps - eps_base)^2 / 2
    eps, eps_base: (B, 4, h, w); w_t: float, of step_weights(). Averaged over a sample's dimensions, as the
    log-probability is; returns (B,).
    """
    return 0.5 * w_t ** 2 * ((eps - eps_base) ** 2).flatten(1).mean(dim=1)
