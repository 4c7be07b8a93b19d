"""Using a trained SHIP: deduction, induction, reasoning and what the latent space holds."""
