"""The report's colours: one accent, and ten cluster colours told apart with any colour vision.

Figures are drawn in the light colours. In the report's SVG each colour becomes the CSS variable of
its name, so that one drawing serves light, dark and print.
"""

LIGHT = {
    "page": "#fefefe",
    "ink": "#1c2430",
    "soft": "#5d6878",
    "rule": "#e1e5eb",
    "mark": "#aab2bf",
    "bar": "#c3cad4",
    "accent": "#3451c6",
    "accent-bar": "#8f9fe0",
    "worst": "#b3361f",
    "c0": "#0072b2",
    "c1": "#e69f00",
    "c2": "#009e73",
    "c3": "#cc79a7",
    "c4": "#56b4e9",
    "c5": "#d55e00",
    "c6": "#882255",
    "c7": "#8f8f2e",
    "c8": "#443399",
    "c9": "#3f8f8a",
}
DARK = {
    "page": "#12161c",
    "ink": "#e4e8ee",
    "soft": "#9aa5b5",
    "rule": "#2c333d",
    "mark": "#5c6777",
    "bar": "#434d5b",
    "accent": "#8fa6ff",
    "accent-bar": "#5467b8",
    "worst": "#ff8f78",
    "c0": "#3d95d6",
    "c1": "#f0b232",
    "c2": "#22b98d",
    "c3": "#dd94bd",
    "c4": "#84cdf7",
    "c5": "#f07b2e",
    "c6": "#c45690",
    "c7": "#b5b54f",
    "c8": "#8d7ff0",
    "c9": "#62b8b2",
}
N_CLUSTER_COLOURS = 10


def cluster_name(cluster: int) -> str:
    """Return the palette name of a cluster; dropped noise (-1) has the colour of marks."""
    return "mark" if cluster < 0 else f"c{cluster % N_CLUSTER_COLOURS}"


def cluster_colour(cluster: int) -> str:
    """Return the light colour of a cluster, the same in every figure."""
    return LIGHT[cluster_name(cluster)]


def css_variables(svg: str) -> str:
    """Replace the light colours in an SVG by the CSS variables of their names."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
