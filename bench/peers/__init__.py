"""What Luthier is compared with, each used as a competent user of it would."""
