"""The parts of `ddpm report`: what a run tells of itself, its curves and images, and the page that shows them."""
