"""Name, version and licence of every installed package, as a Markdown table.

    python benchmarks/licences.py [> benchmarks/results/licences.md]

A package tells its licence as an expression, in a classifier or in free text, in this order.
"""

from importlib.metadata import PackageMetadata, distributions

CLASSIFIER = "License :: "


def main() -> None:
    """Sorted by name."""
    packages = {one.metadata["Name"].lower(): one for one in distributions()}
    print("| package | version | licence |\n|---|---|---|")
    for name in sorted(packages):
        print(f"| {name} | {packages[name].version} | {licence_of(packages[name].metadata)} |")


def licence_of(metadata: PackageMetadata) -> str:
    """What the package says of itself."""
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [text.split(" :: ")[-1] for text in metadata.get_all("Classifier", []) if text.startswith(CLASSIFIER)]
    if named := [text for text in classifiers if text != "OSI Approved"]:
        return ", ".join(named)
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0].strip() if lines else "not told"


if __name__ == "__main__":
    main()
