"""The bar figure of a report: pairs in one panel, absent values, sizes."""

from matplotlib.colors import to_hex

from evaluation.bars import COLOURS, MOST_ROWS, bar_figure, panels


def row(fid=3.0, **more):
    """A row of a report on Inception with a floor of two halves and LPIPS."""
    half = None if fid is None else 2 * fid
    values = dict(fid=fid, floor=fid, floor_n=5, fid_at_floor_n=half, kid=fid and fid / 1000, lpips=0.5, lpips_real=0.6)
    return dict(n_real=10, n_fake=10, **values, **more)


def report(superclasses, overall=None, **more):
    return dict(superclasses=superclasses, overall=overall or row(), comparable=True, **more)


def bars(axes):
    """{colour: lengths of the bars} of a panel."""
    found = {}
    for patch in axes.patches:
        found.setdefault(to_hex(patch.get_facecolor()).upper(), []).append(round(patch.get_width(), 6))
    return {name: found[colour] for name, colour in COLOURS.items() if colour in found}


def test_metrics_to_compare_share_a_panel_and_kid_is_shown():
    figure = bar_figure(report({"cats": row(1.0), "dogs": row(2.0)}))
    shown = {axes.get_title(): bars(axes) for axes in figure.axes if axes.get_visible()}
    assert shown == {
        "FID": {"generated": [1, 2, 3]},
        "FID at floor n": {"generated": [2, 4, 6], "real": [1, 2, 3]},
        "KID x 1000": {"generated": [1, 2, 3]},
        "LPIPS within classes": {"generated": [0.5] * 3, "real": [0.6] * 3},
    }
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["cats", "dogs", "all images"]
    # the floor of a second real set is at FAKE's number of images
    second = {key: value for key, value in row().items() if key != "fid_at_floor_n"}
    figure = bar_figure(report({}, second))
    assert bars(figure.axes[0]) == {"generated": [3], "real": [3]} and figure.axes[1].get_title() == "KID x 1000"


def test_an_absent_value_is_a_dash_and_no_bar():
    figure = bar_figure(report({"cats": row(None), "dogs": row(2.0)}))
    assert bars(figure.axes[0]) == {"generated": [2, 3]}
    assert [text.get_text() for text in figure.axes[0].texts] == ["–"] and not figure.axes[3].texts


def test_other_networks_have_panels_and_a_report_may_have_none():
    features = {"dino": {"fd": 5.0, "kid": -0.01, "floor": 2.0, "floor_n": 5, "fd_at_floor_n": 9.0}}
    titles = [panel.title for panel in panels(report({}, row(None, features=features)))]
    assert titles == ["FD dino", "FD dino at floor n", "KID dino x 1000", "LPIPS within classes"]
    assert not bar_figure(report({}, dict(n_real=9, n_fake=9))).axes[0].get_visible()


def test_the_figure_fits_a_page_also_with_many_superclasses():
    few = bar_figure(report({f"s{i}": row(1.0, features={"dino": {"fd": 1.0, "kid": 0.1}}) for i in range(11)}))
    assert few.get_size_inches()[0] <= 7.5 and few.get_size_inches()[1] <= 11
    many = bar_figure(report({f"s{i}": row(1.0) | {"n_real": i} for i in range(1103)}))
    assert len(many.axes[0].get_yticklabels()) == MOST_ROWS + 1 and many.get_size_inches()[1] < 30
    assert many.axes[0].get_yticklabels()[0].get_text() == f"s{1103 - MOST_ROWS}"
    assert "the 40 of 1103 superclasses" in many.get_suptitle()
