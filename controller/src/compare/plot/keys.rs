//! Places the keys of points without overlaps: beside their point, or at the end of a line in
//! crowded areas. Points in one place share a key, and so do points without space.

use std::f64::consts::TAU;

/// Estimated widths of a character of a key and of a separator, and the height of a key.
const CHARACTER: i32 = 18;
const BETWEEN: i32 = 10;
const HEIGHT: i32 = 27;
/// Minimum gap between two keys.
const GAP: i32 = 6;
/// Maximum distance of points that count as one.
const CLOSE: i32 = 4;
/// Distance from a point to the centre of a key at the end of a line: minimum, maximum, step.
const NEAREST: i32 = 40;
const FARTHEST: i32 = 320;
const STEP: usize = 10;
/// Number of directions of such a line.
const DIRECTIONS: i32 = 24;

/// A position in the drawing.
pub(super) type PixelPosition = (i32, i32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) left: i32,
    pub(super) top: i32,
    pub(super) right: i32,
    pub(super) bottom: i32,
}

/// A point with a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyed<'a> {
    /// Points of different groups never share a key.
    pub(super) group: usize,
    pub(super) at: PixelPosition,
    /// Its key; empty: none.
    pub(super) key: &'a str,
}

/// A placed label of one or several keys.
#[derive(Clone, Debug)]
pub(super) struct Label {
    /// `1`, or `1-3, 7`.
    pub(super) text: String,
    /// Its rectangle in the drawing, pixels.
    pub(super) area: Area,
    /// The line from its point, unless it is beside it.
    pub(super) line: Option<[PixelPosition; 2]>,
}

/// Points of a group with a shared key.
struct Shared<'a> {
    group: usize,
    at: PixelPosition,
    keys: Vec<&'a str>,
}

/// Places the keys of these points inside `room` and outside all `marks`. Without any space, the
/// last one of a group is placed where it hides least.
pub(super) fn labels(points: &[Keyed<'_>], room: Area, marks: &[Area]) -> Vec<Label> {
    let mut shared: Vec<Shared<'_>> = Vec::new();
    for point in points.iter().filter(|point| !point.key.is_empty()) {
        let is_close = |other: &Shared<'_>| {
            let (x, y) = (other.at.0 - point.at.0, other.at.1 - point.at.1);
            other.group == point.group && x.abs() <= CLOSE && y.abs() <= CLOSE
        };
        match shared.iter().position(is_close) {
            Some(known) => shared[known].keys.push(point.key),
            None => shared.push(Shared { group: point.group, at: point.at, keys: vec![point.key] }),
        }
    }
    loop {
        let (labels, homeless) = lay(&shared, room, marks);
        if !give_away(&mut shared, &homeless) {
            return labels;
        }
    }
}

/// Places the labels one after another. Returns those without space, too.
fn lay(shared: &[Shared<'_>], room: Area, marks: &[Area]) -> (Vec<Label>, Vec<usize>) {
    let mut labels: Vec<Label> = Vec::new();
    let mut lines: Vec<Area> = Vec::new();
    let mut homeless = Vec::new();
    for (number, point) in shared.iter().enumerate() {
        let text = together(&point.keys);
        let width = |c: char| if c.is_alphanumeric() { CHARACTER } else { BETWEEN };
        let size = (text.chars().map(width).sum::<i32>() + GAP, HEIGHT);
        let taken = || marks.iter().chain(labels.iter().map(|label| &label.area)).chain(lines.iter());
        let is_free = |place: &(Area, Option<[PixelPosition; 2]>)| {
            let (area, line) = place;
            let crosses = |[from, to]: [PixelPosition; 2]| {
                along(from, to).any(|step| labels.iter().any(|label| label.area.common(&step) > 0))
            };
            room.holds(area) && taken().all(|other| area.common(other) == 0) && !line.is_some_and(crosses)
        };
        let near = beside(point.at, size);
        let place = near.into_iter().map(|area| (area, None)).chain(away(point.at, size)).find(is_free);
        let (area, line) = place.unwrap_or_else(|| {
            homeless.push(number);
            let hidden = |area: &Area| taken().map(|other| area.common(other)).sum::<i32>();
            (near.into_iter().min_by_key(hidden).expect("there are six"), None)
        });
        lines.extend(line.into_iter().flat_map(|[from, to]| along(from, to)));
        labels.push(Label { text, area, line });
    }
    (labels, homeless)
}

/// Merges labels without space into that of the nearest point of their group; `false` if there is
/// none.
fn give_away(shared: &mut Vec<Shared<'_>>, homeless: &[usize]) -> bool {
    let before = shared.len();
    for &from in homeless {
        let (group, at) = (shared[from].group, shared[from].at);
        let others = shared.iter().enumerate();
        let others = others.filter(|(to, other)| *to != from && other.group == group && !other.keys.is_empty());
        let nearest = others.min_by_key(|(_, other)| (other.at.0 - at.0).abs() + (other.at.1 - at.1).abs());
        if let Some((to, _)) = nearest {
            let keys = std::mem::take(&mut shared[from].keys);
            shared[to].keys.extend(keys);
        }
    }
    shared.retain(|point| !point.keys.is_empty());
    shared.len() < before
}

/// Keys as one text, with ranges of numbers.
fn together(keys: &[&str]) -> String {
    let mut keys = keys.to_vec();
    keys.sort_by_key(|key| (key.len(), *key));
    let follows = |a: &&str, b: &&str| matches!((a.parse::<u32>(), b.parse::<u32>()), (Ok(a), Ok(b)) if b == a + 1);
    let runs = keys.chunk_by(follows).map(|run| match run {
        [first, _, .., last] => format!("{first}-{last}"),
        few => few.join(", "),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// The six positions beside a point.
fn beside((x, y): PixelPosition, (width, height): (i32, i32)) -> [Area; 6] {
    let mark = super::POINT;
    let (right, left, middle) = (x + mark + 2, x - mark - 2 - width, x - width / 2);
    let (above, below) = (y - mark - height + 4, y + mark - 4);
    let corners =
        [(right, above), (left, above), (right, below), (left, below), (middle, above - 6), (middle, below + 6)];
    corners.map(|(left, top)| Area { left, top, right: left + width, bottom: top + height })
}

/// Positions around a point with a connecting line, from near to far.
fn away(
    (x, y): PixelPosition,
    (width, height): (i32, i32),
) -> impl Iterator<Item = (Area, Option<[PixelPosition; 2]>)> {
    let turns = (0..DIRECTIONS).map(|direction| f64::from(direction) * TAU / f64::from(DIRECTIONS));
    let ways: Vec<(f64, f64)> = turns.map(|angle| (angle.cos(), angle.sin())).collect();
    (NEAREST..FARTHEST).step_by(STEP).flat_map(move |distance| {
        let place = move |(across, up): (f64, f64)| {
            let left = x + (f64::from(distance) * across).round() as i32 - width / 2;
            let top = y - (f64::from(distance) * up).round() as i32 - height / 2;
            let area = Area { left, top, right: left + width, bottom: top + height };
            let end = (x.clamp(area.left, area.right), y.clamp(area.top, area.bottom));
            (area, Some([(x, y), end]))
        };
        ways.clone().into_iter().map(place)
    })
}

/// Small areas along a line that cover it for overlap tests.
pub(super) fn along(from: PixelPosition, to: PixelPosition) -> impl Iterator<Item = Area> {
    let (x, y) = (to.0 - from.0, to.1 - from.1);
    let steps = x.abs().max(y.abs()) / 6 + 1;
    (0..=steps).map(move |step| Area::around(from.0 + x * step / steps, from.1 + y * step / steps, 1))
}

impl Area {
    /// The square within `by` of a position.
    pub(super) fn around(x: i32, y: i32, by: i32) -> Self {
        Self { left: x - by, top: y - by, right: x + by, bottom: y + by }
    }

    /// Area of the intersection.
    fn common(&self, other: &Self) -> i32 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0) * height.max(0)
    }

    /// Whether `other` is inside.
    fn holds(&self, other: &Self) -> bool {
        self.left <= other.left && other.right <= self.right && self.top <= other.top && other.bottom <= self.bottom
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Area = Area { left: 148, top: 68, right: 836, bottom: 483 };

    /// Places the keys 1, 2, 3, ... of these points and asserts that nothing overlaps.
    fn laid(places: &[PixelPosition]) -> Vec<Label> {
        let keys: Vec<String> = (1..=places.len()).map(|number| number.to_string()).collect();
        let points: Vec<Keyed<'_>> =
            places.iter().zip(&keys).map(|(at, key)| Keyed { group: 0, at: *at, key: key.as_str() }).collect();
        let marks: Vec<Area> = places.iter().map(|(x, y)| Area::around(*x, *y, 8)).collect();
        let labels = labels(&points, ROOM, &marks);
        for (i, label) in labels.iter().enumerate() {
            assert!(ROOM.holds(&label.area), "{label:?}");
            assert!(marks.iter().all(|mark| mark.common(&label.area) == 0), "{label:?} on a mark");
            for other in labels.iter().take(i) {
                assert_eq!(label.area.common(&other.area), 0, "{label:?} {other:?}");
            }
            let lines = labels.iter().enumerate().filter(|(of, _)| *of != i).filter_map(|(_, other)| other.line);
            for [from, to] in lines {
                assert!(along(from, to).all(|step| step.common(&label.area) == 0), "a line through {label:?}");
            }
        }
        labels
    }

    fn texts(labels: &[Label]) -> Vec<&str> {
        labels.iter().map(|label| label.text.as_str()).collect()
    }

    #[test]
    fn key_is_placed_beside_its_point_if_there_is_room() {
        let labels = laid(&[(300, 200), (500, 300)]);
        assert_eq!(texts(&labels), ["1", "2"]);
        assert!(labels.iter().all(|label| label.line.is_none()));
    }

    #[test]
    fn keys_of_close_points_do_not_overlap() {
        let row: Vec<PixelPosition> = (0..12).map(|i| (330 + 6 * i, 200 + 15 * (i % 3))).collect();
        let labels = laid(&row);
        assert!(labels.len() > 8 && labels.iter().any(|label| label.line.is_some()), "{labels:?}");
        // Also at the edges of the room.
        laid(&[(150, 70), (151, 80), (800, 70), (150, 480), (800, 480), (795, 475)]);
    }

    #[test]
    fn coinciding_or_crowded_points_share_a_key() {
        assert_eq!(texts(&laid(&[(400, 200), (402, 201), (398, 199), (500, 200), (401, 202)])), ["1-3, 5", "4"]);
        assert!(laid(&[(400, 200); 40]).len() == 1);
        let crowd: Vec<PixelPosition> = (0..30).map(|i| (380 + 5 * i, 200 + (37 * i) % 50)).collect();
        let labels = laid(&crowd);
        assert!(labels.len() < 30 && labels.len() > 3, "{labels:?}");
    }

    #[test]
    fn different_groups_do_not_share_a_key() {
        let point = |group, key| Keyed { group, at: (400, 200), key };
        let labels = labels(&[point(0, "1"), point(1, "a"), point(1, "b")], ROOM, &[]);
        assert_eq!(texts(&labels), ["1", "a, b"]);
    }

    #[test]
    fn consecutive_numbers_are_written_as_a_range() {
        assert_eq!(together(&["10", "9", "8", "2", "1"]), "1, 2, 8-10");
        assert_eq!(together(&["b", "a", "c"]), "a, b, c");
    }
}
