//! Colours of plots by meaning, with values for light and dark mode.

use plotters::style::RGBColor;

/// A colour by its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    /// Background.
    Surface,
    /// Text and axes.
    Ink,
    /// Labels of points.
    Muted,
    Grid,
    First,
    Second,
    Third,
    Fourth,
    /// Step of a magnitude scale, from 0 (below the threshold) to 7 (the largest).
    Heat(u8),
}

/// Red, green, blue.
pub(crate) type Rgb = [u8; 3];

/// A colour with its values for light and dark mode.
pub(crate) type Tint = (Colour, Rgb, Rgb);

impl Colour {
    /// Number of steps of [`Self::Heat`].
    pub(crate) const STEPS: u8 = 8;

    /// All colours with their values for light and dark mode.
    pub(crate) const ALL: [Tint; 16] = [
        (Self::Surface, [0xff, 0xff, 0xff], [0x14, 0x18, 0x1d]),
        (Self::Ink, [0x1b, 0x1f, 0x24], [0xe6, 0xea, 0xef]),
        (Self::Muted, [0x4f, 0x58, 0x63], [0xb3, 0xbc, 0xc7]),
        (Self::Grid, [0xd8, 0xde, 0xe4], [0x36, 0x3f, 0x4a]),
        (Self::First, [0x0b, 0x5c, 0xad], [0x6c, 0xb4, 0xff]),
        (Self::Second, [0xb0, 0x4a, 0x00], [0xff, 0xa6, 0x57]),
        (Self::Third, [0x1a, 0x70, 0x37], [0x6c, 0xd0, 0x8a]),
        (Self::Fourth, [0x7a, 0x3f, 0xb8], [0xcf, 0xa6, 0xff]),
        (Self::Heat(0), [0xef, 0xf2, 0xf5], [0x22, 0x28, 0x30]),
        (Self::Heat(1), [0xfd, 0xe0, 0xa6], [0x4a, 0x1f, 0x5e]),
        (Self::Heat(2), [0xfd, 0xbf, 0x6f], [0x71, 0x20, 0x6e]),
        (Self::Heat(3), [0xf9, 0x91, 0x4f], [0x98, 0x2d, 0x68]),
        (Self::Heat(4), [0xe6, 0x5f, 0x52], [0xc0, 0x42, 0x55]),
        (Self::Heat(5), [0xbf, 0x37, 0x68], [0xe1, 0x64, 0x3b]),
        (Self::Heat(6), [0x87, 0x22, 0x6f], [0xf7, 0x99, 0x26]),
        (Self::Heat(7), [0x45, 0x0d, 0x54], [0xfb, 0xe0, 0x6b]),
    ];

    /// Value in light mode.
    pub(super) fn rgb(self) -> RGBColor {
        let [r, g, b] = Self::ALL.iter().find(|(colour, ..)| *colour == self).map_or([0; 3], |(_, light, _)| *light);
        RGBColor(r, g, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_distinct_in_light_and_dark() {
        let distinct =
            |of: fn(&Tint) -> Rgb| Colour::ALL.iter().map(of).collect::<std::collections::BTreeSet<_>>().len();
        assert_eq!((distinct(|c| c.1), distinct(|c| c.2)), (Colour::ALL.len(), Colour::ALL.len()));
    }

    /// Relative luminance and contrast of WCAG 2.1.
    fn contrast(a: Rgb, b: Rgb) -> f64 {
        let luminance = |rgb: Rgb| {
            let linear = rgb.map(|c| {
                let c = f64::from(c) / 255.0;
                if c <= 0.040_45 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            });
            0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        };
        let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
        a.max(b) / a.min(b)
    }

    #[test]
    fn text_and_marks_have_contrast_in_light_and_dark() {
        let (_, light, dark) = Colour::ALL[0];
        for (colour, on_light, on_dark) in Colour::ALL {
            let least = match colour {
                Colour::Ink | Colour::Muted => 7.0,
                Colour::First | Colour::Second | Colour::Third | Colour::Fourth => 4.5,
                Colour::Surface | Colour::Grid | Colour::Heat(_) => 1.0,
            };
            let (a, b) = (contrast(on_light, light), contrast(on_dark, dark));
            assert!(a >= least && b >= least, "{colour:?}: {a} {b}");
        }
    }
}
