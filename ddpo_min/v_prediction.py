"""Models that predict v instead of the noise: the noise that v implies, and the schedule that many of them have.

    v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0    [Salimans & Ho 2022, Sec. 4]

The sampler, the policy and all losses stay as they are: they get the eps of eps_from_v().
"""
PREDICTIONS = ("eps", "v", "v_zsnr")    # of a UNet: the noise; v; v with the schedule of zero_terminal_snr()

LAST = 4.8973451890853435e-08       # alpha_bar_999 of that schedule; 0 in the paper, but x0_hat() divides by its root


def eps_from_v(v, x_t, alpha_bar_t):
    """The noise that a predicted v implies.

    eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t    [Salimans & Ho 2022, App. D]
    v, x_t: (B, 4, H, W), float32 at least: x0_hat() takes a small difference of x_t and this eps; alpha_bar_t in
    [0, 1], a float or (B, 1, 1, 1); returns (B, 4, H, W).
    """
    return alpha_bar_t ** 0.5 * v + (1 - alpha_bar_t) ** 0.5 * x_t


def zero_terminal_snr(alpha_bar):
    """A noise schedule, moved and stretched so that nothing of the picture is left in its noisiest latent.

    r_t <- (r_t - r_999) r_0 / (r_0 - r_999) with r_t = sqrt(alpha_bar_t)    [Lin et al. 2024, Alg. 1]
    alpha_bar: (1000,), decreasing; returns the same, but for its last number, which is LAST, as in ComfyUI.
    """
    root = alpha_bar.sqrt()
    stretched = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    stretched[-1] = LAST
    return stretched
