"""From logits to tokens: sampling, stop conditions and the decode loop. Token ids only; text lives in the runtime."""
