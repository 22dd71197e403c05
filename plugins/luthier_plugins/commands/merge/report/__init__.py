"""What a merge leaves beside its weights: card, result, and the proof that it reads back."""
