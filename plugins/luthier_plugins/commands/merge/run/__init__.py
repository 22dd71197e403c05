"""The merge itself: tensor by tensor, in parallel, scored where asked."""
